"""Which tokens does a model read before its label, and which tokens is the label? The same in training and inference.

One builder serves both: a training row is the inference prompt's tokens, the label's tokens and the end token. The text
goes through the model's chat template where it has one, else it is a plain form. Tokens of a label are those that
follow the end of the prompt, so they do not depend on the dialogue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nbhelpers import data, icd10, records
from nbhelpers.scoring import encode

FILE = "prompt.json"  # beside a tuned model: how it was taught, so that it can be asked the same way
FORMAT = 1  # of the prompts' wording: a new number makes every cached answer an old one
SYSTEM = {
    "icd10": "Read the talk of a doctor and a patient. Give the ICD-10-CM code of the diagnosis.",
    "labels": "Read the talk of a doctor and a patient. Give its label.",
}
ASKED = {"icd10": "ICD-10-CM code:", "labels": "Label:"}
DATE = "26 Jul 2024"  # what templates that write a date get: today's would be another prompt tomorrow
PROBE = "answer-9"  # an answer whose place in a template is looked for
CUT = 8  # characters more that are cut where a cut text still has a token too many


class Prompt(NamedTuple):
    """ids: tokens that the model reads; cut: characters of the dialogue's beginning that were left out."""

    ids: tuple[int, ...]
    cut: int


@dataclass(frozen=True)
class Wording:
    """What is said around a dialogue, the same for every model of a comparison.

    shots: solved (dialogue, label) pairs that stand before the question. listed: labels named in the prompt.
    """

    kind: str = "icd10"
    system: str = ""
    listed: tuple[str, ...] = ()
    shots: tuple[tuple[str, str], ...] = ()

    def instruction(self) -> str:
        """The system prompt and, where labels are listed, their list."""
        said = self.system or SYSTEM[self.kind]
        names = ", ".join(written(label, self.kind) for label in self.listed)
        return f"{said} It is one of: {names}." if names else said

    def question(self, dialogue: str) -> str:
        return f"{dialogue}\n\n{ASKED[self.kind]}"

    def record(self) -> dict[str, Any]:
        """What a protocol names: no dialogue stands in it, shots are counted and hashed."""
        return {
            "format": FORMAT,
            "system_prompt": self.system or SYSTEM[self.kind],
            "question": ASKED[self.kind],
            "labels_listed": len(self.listed),
            "shots": len(self.shots),
            "sha256": records.sha256_json(
                [FORMAT, self.instruction(), self.question(""), [list(shot) for shot in self.shots]]
            ),
        }


def written(label: str, kind: str) -> str:
    """A label as a model reads and writes it.

    >>> written("E119", "icd10"), written("FAM/SOCHX", "labels")
    ('E11.9', 'FAM/SOCHX')
    """
    return icd10.dotted(label) if kind == "icd10" else label


@dataclass
class Prompts:
    """Prompts and labels of one comparison in the tokens of one model.

    window: most tokens of prompt, label and end together. room: tokens kept free for the answer, the same in training,
    ranking and writing; so all three read one prompt.
    """

    tokenizer: Any
    wording: Wording
    labels: Sequence[str]
    window: int
    new_tokens: int
    around: tuple[str, str] | None = None  # the text before and after the dialogue; None: as the template writes it
    answers: dict[str, tuple[int, ...]] = field(init=False)  # tokens of each label, the end token included
    end: int | None = field(init=False)  # the token that ends an answer
    prefix: str = field(init=False)  # what stands between the prompt and the answer's first letter
    room: int = field(init=False)
    system_in_user: bool = field(init=False, default=False)  # the template knows no system role

    def __post_init__(self) -> None:
        before, after = self.around = self.around or self._around()
        self.prefix, self.end = self._around_answer()
        self.answers = {label: self._answer(label) for label in self.labels}
        longest = max((len(ids) for ids in self.answers.values()), default=0)
        self.room = max(self.new_tokens, longest)
        fixed = len(self._encode(before + after))
        if fixed + self.room >= self.window:
            raise ValueError(
                f"system prompt, labels and shots take {fixed} tokens and the answer up to {self.room}, which leaves "
                f"nothing of a window of {self.window} for the dialogue; list fewer labels, give fewer shots or a "
                "shorter system prompt"
            )

    @property
    def chat(self) -> bool:
        """Whether the model's own chat template is used."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def prompt(self, dialogue: str) -> Prompt:
        """What is read before the label; where it is too long, the beginning of the dialogue goes."""
        most, cut = self.window - self.room, 0
        dialogue = dialogue.replace("\r\n", "\n").strip()
        if len(dialogue) > 16 * most:  # no tokenizer makes so few tokens: spares it the longest texts
            cut = len(dialogue) - 16 * most
        while len(ids := self._encode(self.text(dialogue[cut:]))) > most:
            left = len(dialogue) - cut
            if not left:
                raise ValueError(f"the prompt has {len(ids)} tokens without any dialogue, the window leaves {most}")
            over = len(ids) - most
            cut += min(left, max(CUT, over * left // len(ids)))
        return Prompt(tuple(ids), cut)

    def row(self, dialogue: str, label: str) -> dict[str, Any]:
        """A training row: the prompt as it is asked, the label and the end token; the loss is on these two alone."""
        prompt = self.prompt(dialogue).ids
        ids = torch.tensor([*prompt, *self.answers[label]], dtype=torch.long)
        return {"input_ids": ids, "labels": data.mask_prompt(ids, len(prompt)), "prompt_length": len(prompt)}

    def text(self, dialogue: str) -> str:
        """The prompt as a text."""
        return dialogue.join(self.around)

    def record(self) -> Mapping[str, Any]:
        """What of it belongs into an identity of answers."""
        template = getattr(self.tokenizer, "chat_template", None)
        return {
            "wording": self.wording.record(),
            "around": records.sha256_json(list(self.around)),
            "window": self.window,
            "room": self.room,
            "template": None if template is None else records.sha256_json(template),
            "answers": records.sha256_json([list(self.answers[label]) for label in self.labels]),
        }

    def save(self, folder: str | Path) -> None:
        """Write prompt.json into a model's folder. Solved dialogues are counted there, their text is not kept."""
        wording = self.wording
        told = {"kind": wording.kind, "system": wording.system, "listed": list(wording.listed)}
        told |= {"shots": len(wording.shots), "labels": list(self.labels), "format": FORMAT}
        told |= {"around": None if wording.shots else list(self.around)}
        records.write_json(Path(folder) / FILE, told | {"window": self.window, "new_tokens": self.new_tokens})

    # how it is put together --------------------------------------------------------------------------------------

    def _around(self) -> tuple[str, str]:
        """The text before and after the dialogue of the question."""
        mark = "\x00"
        whole = self._chat_text(mark) if self.chat else self._plain_text(mark)
        before, _, after = whole.rpartition(mark)
        return before, after

    def _plain_text(self, dialogue: str) -> str:
        shots = [f"{self.wording.question(text)} {self._written(label)}\n\n" for text, label in self.wording.shots]
        return "\n\n".join([self.wording.instruction(), "".join(shots) + self.wording.question(dialogue)])

    def _chat_text(self, dialogue: str) -> str:
        return self._render(self._messages(dialogue), add_generation_prompt=True)

    def _messages(self, dialogue: str) -> list[dict[str, str]]:
        said = [("system", self.wording.instruction())]
        for text, label in self.wording.shots:
            said += [("user", self.wording.question(text)), ("assistant", self._written(label))]
        said.append(("user", self.wording.question(dialogue)))
        return [{"role": role, "content": content} for role, content in said]

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The messages through the template; where it knows no system role, or drops it without a word, the system
        text begins the first question."""
        from jinja2 import TemplateError

        options |= {"tokenize": False, "date_string": DATE}
        if not self.system_in_user:
            try:
                text = self.tokenizer.apply_chat_template(messages, **options)
                if messages[0]["content"].strip() in text:
                    return text
            except TemplateError:
                pass
            self.system_in_user = True
        (first, second), rest = messages[:2], messages[2:]
        joined = {"role": "user", "content": f"{first['content']}\n\n{second['content']}"}
        return self.tokenizer.apply_chat_template([joined, *rest], **options)

    def _written(self, label: str) -> str:
        return written(label, self.wording.kind)

    def _encode(self, text: str) -> list[int]:
        if self.chat:  # the template writes the first token itself
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return encode(self.tokenizer, [text])[0]

    def _answer(self, label: str) -> tuple[int, ...]:
        """Tokens of a label where it follows the prompt, and the token that ends an answer."""
        tail, said = self.around[1], self.prefix + self._written(label)
        ids, whole = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (tail, tail + said))
        if whole[: len(ids)] != ids:  # the tokenizer joins them: as the model writes on, they stay apart
            whole = [*ids, *self.tokenizer(said, add_special_tokens=False)["input_ids"]]
        found = tuple(whole[len(ids) :])
        if not found:
            raise ValueError(f"label {label!r} has no tokens of its own, so it can be neither asked for nor taught")
        return found if self.end is None else (*found, self.end)

    def _around_answer(self) -> tuple[str, int | None]:
        """(what stands before an answer's first letter, the token that ends it), as the chat template writes them."""
        if not self.chat:
            return " ", self.tokenizer.eos_token_id
        asked = [{"role": "user", "content": "."}]
        options = {"tokenize": False, "date_string": DATE}
        prompt = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
        whole = self.tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": PROBE}], **options)
        if not whole.startswith(prompt) or PROBE not in whole[len(prompt) :]:
            return "", self.tokenizer.eos_token_id
        before, _, after = whole[len(prompt) :].partition(PROBE)
        known = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        tail = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        special = [token for token in tail if token in known | set(self.tokenizer.all_special_ids)]
        return before, special[0] if special else self.tokenizer.eos_token_id


def load(folder: str | Path, tokenizer: Any) -> Prompts:
    """The prompts that the model in `folder` was taught with.

    LookupError where no prompt.json lies there; ValueError where solved dialogues stood in them, which are not kept.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise LookupError(f"{str(folder)!r} has no {FILE}, so it is not known how it was taught: name a tuned model")
    told = records.read_json(path)
    if told["shots"]:
        raise ValueError(
            f"{str(folder)!r} was taught with {told['shots']} solved dialogues in each prompt, whose text is not kept: "
            "it cannot be asked the same way"
        )
    wording = Wording(told["kind"], told["system"], tuple(told["listed"]))
    return Prompts(tokenizer, wording, told["labels"], told["window"], told["new_tokens"], around=tuple(told["around"]))
