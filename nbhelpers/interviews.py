"""What do trained models answer to interviews of one's own, a folder of JSON files with talks of doctor and patient?

A file is {"name", "expected_label" (or none), "messages": [{"role": "doctor" or "patient", "message"}]}. What was said
in it stands in no result and in no error: a file is named by its file name and the sha256 of its dialogue.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nbhelpers import coding_metrics, icd10, records
from nbhelpers.prompts import written
from nbhelpers.registry import unknown

ROLES = {"doctor": "Doctor", "patient": "Patient"}
FIELDS, MESSAGE_FIELDS = ("name", "expected_label", "messages"), ("role", "message")
RANKS = 3  # labels of a ranking that a result shows
NOTICE = (
    "Research software, not for diagnosis: what a model answers here may be wrong in any way, and a few interviews "
    "show little of how often."
)
Answer = Callable[[str, list[str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Interview:
    """One file. id: its name without .json; expected_label: as it is written there, None where none is."""

    id: str
    name: str
    expected_label: str | None
    messages: tuple[tuple[str, str], ...]  # (role, message)

    @property
    def sha256(self) -> str:
        return records.sha256_text(as_dialogue(self))


class Folder(NamedTuple):
    """What a folder holds; left_out: a line for each file that is no interview."""

    interviews: list[Interview]
    left_out: list[str]


def read(folder: str | Path, *, lenient: bool = False, kind: str = "labels") -> Folder:
    """The interviews of a folder's *.json files, by file name.

    ValueError names every file that is none, a line each; with lenient they are left out and listed. kind "icd10": one
    whose expected label is no code is none. ValueError too for a folder that is not there or holds no interview.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"interviews must be a folder of JSON files, got {str(folder)!r}: name an existing folder")
    found, left_out = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(_interview(path, kind))
        except ValueError as error:
            left_out.append(f"{path.name}: {error}")
    if left_out and not lenient:
        raise ValueError(
            f"{len(left_out)} of {len(found) + len(left_out)} files of {str(folder)!r} are no interviews; correct "
            "them, or be lenient to leave them out:\n" + "\n".join(left_out)
        )
    if not found:
        raise ValueError(f"{str(folder)!r} holds no interview: put *.json files with name and messages there")
    return Folder(found, left_out)


def _interview(path: Path, kind: str) -> Interview:
    try:
        content = records.read_json(path)
    except ValueError:
        raise ValueError("is not valid JSON in UTF-8") from None  # the reason would quote the file
    if not isinstance(content, dict):
        raise ValueError(f"must hold one object with {', '.join(FIELDS)}, got {type(content).__name__}")
    _known_fields(content, FIELDS)
    name, expected, messages = (content.get(key) for key in FIELDS)
    if not isinstance(name, str) or not name.strip():
        raise ValueError("name must be a text that is not empty")
    if expected is not None and (not isinstance(expected, str) or not expected.strip()):
        raise ValueError("expected_label must be a text that is not empty; leave it out where there is none")
    if expected is not None and kind == "icd10" and not icd10.is_code(expected):
        raise ValueError(
            f"expected_label {expected.strip()[:40]!r} is no code of ICD-10-CM; correct it, or take it out to have the "
            "interview answered without judging"
        )
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    said = tuple(_message(number, message) for number, message in enumerate(messages, 1))
    return Interview(path.stem, name.strip(), expected and expected.strip(), said)


def _message(number: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with role and message, got {type(message).__name__}")
    _known_fields(message, MESSAGE_FIELDS, f"message {number}: ")
    role, text = message.get("role"), message.get("message")
    if role not in ROLES:
        raise ValueError(f"message {number}: {unknown('role', str(role)[:20], ROLES)}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"message {number} is empty: give it a text or leave it out")
    return role, " ".join(text.split())  # a line of its own would read as somebody else's


def _known_fields(content: Mapping[str, Any], fields: Collection[str], where: str = "") -> None:
    for key in content:
        if key not in fields:
            raise ValueError(where + unknown("field", key[:40], fields))


def as_dialogue(interview: Interview) -> str:
    """As the models of a comparison read it: a line a message, `Doctor: ...` and `Patient: ...`."""
    return "\n".join(f"{ROLES[role]}: {message}" for role, message in interview.messages)


def run(
    folder: str | Path,
    models: Sequence[str],
    answer: Answer,
    *,
    kind: str = "icd10",
    labels: Collection[str] | None = None,
    lenient: bool = False,
) -> dict[str, Any]:
    """Ask each model every interview; what they answered and how often they were right, as a JSON result.

    answer: (model, dialogues) -> a line {"ranked" or "written", "probability"} for each dialogue, in their order; it
    loads the model and gives its memory back. kind: of the labels, "icd10" or "labels". labels: those that the models
    know; an expected one that is not among them is said, and counted as wrong.
    """
    if not models:
        raise ValueError("models must name at least one trained model, got none")
    repeated = next((name for name in models if list(models).count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"model {repeated!r} is named twice: name it once")
    found, left_out = read(folder, lenient=lenient, kind=kind)
    canonical = icd10.normal if kind == "icd10" else str
    expected = [None if one.expected_label is None else canonical(one.expected_label) for one in found]
    foreign = [
        one.id
        for one, label in zip(found, expected, strict=True)
        if labels is not None and label not in (None, *labels)
    ]
    dialogues = [as_dialogue(one) for one in found]
    result = {
        "kind": "interviews",
        "label_kind": kind,
        "interviews": len(found),
        "with_expected_label": sum(label is not None for label in expected),
        "left_out": left_out,
        "label_not_known_to_the_models": foreign,
        "models": {},
        "notice": NOTICE,
    }
    for name in models:
        lines = answer(name, dialogues)
        if len(lines) != len(found):
            raise ValueError(f"model {name!r} gave {len(lines)} answers to {len(found)} interviews: one each is needed")
        result["models"][name] = [
            _line(one, label, line) for one, label, line in zip(found, expected, lines, strict=True)
        ]
    return result | {"summary": summary(result)}


def _line(one: Interview, expected: str | None, line: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the result: labels alone, never what a model wrote around one."""
    said = coding_metrics.prediction(line)
    found = {"id": one.id, "sha256": one.sha256, "expected": expected, "said": said}
    found["right"] = None if expected is None else said == expected
    found["ranked"] = list(line["ranked"][:RANKS]) if line.get("ranked") else None
    found["probability"] = line.get("probability")
    if "written" in line:
        found["written"] = line["written"]
    return found


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a model: answers, how many have an expected label, how many of them are right, with the accuracy's 95 %
    interval; None where there is nothing to measure. no_valid_answer: of written answers, None where none was asked."""
    rows = []
    for name, lines in result["models"].items():
        judged = [line["right"] for line in lines if line["right"] is not None]
        interval = coding_metrics.accuracy_interval(judged) if judged else {}
        texts = [line["written"] for line in lines if "written" in line]
        rows.append(
            {
                "model": name,
                "n": len(lines),
                "with_expected_label": len(judged),
                "right": sum(judged) if judged else None,
                "accuracy": sum(judged) / len(judged) if judged else None,
                "low": interval.get("low"),
                "high": interval.get("high"),
                "no_valid_answer": texts.count(None) if texts else None,
            }
        )
    return rows


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each model and interview, labels as people write them."""

    def shown(label: str | None) -> str | None:
        return None if label is None else written(label, result["label_kind"])

    return [
        {
            "model": name,
            "interview": line["id"],
            "expected": shown(line["expected"]),
            "answer": shown(line["said"]),
            "right": line["right"],
            "probability": line["probability"],
        }
        for name, lines in result["models"].items()
        for line in lines
    ]
