"""Interviews are read strictly, asked of every model, and stay out of the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbhelpers import generated_dialogues, icd10, interviews, records

CANARY = "canary-91c2 it hurts behind the left ear"
GOOD = {
    "name": "one",
    "messages": [{"role": "doctor", "message": "What is it?"}, {"role": "patient", "message": CANARY}],
}


def put(folder: Path, **files) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def with_label(label: str | None) -> dict:
    return GOOD | {"expected_label": label}


def answers(*lines: dict):
    """A model that gives these lines, whatever it is asked."""
    return lambda model, dialogues: list(lines)


# reading --------------------------------------------------------------------------------------------------------------


def test_an_interview_reads_as_lines_of_doctor_and_patient(tmp_path):
    messages = [("doctor", " What\nis it? "), ("patient", "A cough."), ("patient", "And a fever.")]
    content = GOOD | {"messages": [{"role": role, "message": text} for role, text in messages]}
    (one,), left_out = interviews.read(put(tmp_path, a=content))
    assert interviews.as_dialogue(one) == "Doctor: What is it?\nPatient: A cough.\nPatient: And a fever."
    assert (one.id, one.name, one.expected_label, left_out) == ("a", "one", None, [])
    assert one.sha256 == records.sha256_text("Doctor: What is it?\nPatient: A cough.\nPatient: And a fever.")


def test_files_come_by_name_and_other_files_are_none(tmp_path):
    put(tmp_path, b=GOOD, a=GOOD)
    (tmp_path / "notes.txt").write_text("no interview", encoding="utf-8")
    assert [one.id for one in interviews.read(tmp_path).interviews] == ["a", "b"]


BAD = {
    "no_json": ("{" + CANARY, "is not valid JSON in UTF-8"),
    "a_list": ([GOOD], "must hold one object with name, expected_label, messages, got list"),
    "no_name": ({"messages": GOOD["messages"]}, "name must be a text that is not empty"),
    "typo": (GOOD | {"expectedlabel": "I10"}, "unknown field 'expectedlabel'. Did you mean 'expected_label'?"),
    "label_5": (GOOD | {"expected_label": 5}, "expected_label must be a text that is not empty"),
    "none_said": (GOOD | {"messages": []}, "messages must be a list with at least one message"),
    "a_text": (GOOD | {"messages": [CANARY]}, "message 1 must be an object with role and message, got str"),
    "nurse": (
        GOOD | {"messages": [*GOOD["messages"], {"role": "nurse", "message": CANARY}]},
        "message 3: unknown role 'nurse'. Available: doctor, patient",
    ),
    "silent": (GOOD | {"messages": [{"role": "doctor", "message": " \n"}]}, "message 1 is empty"),
    "more": (
        GOOD | {"messages": [{"role": "doctor", "message": CANARY, "mood": "x"}]},
        "message 1: unknown field 'mood'. Available: role, message",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_interview_is_named_with_what_is_wrong_and_without_its_text(name, tmp_path):
    content, said = BAD[name]
    with pytest.raises(ValueError, match="1 of 2 files") as caught:
        interviews.read(put(tmp_path, good=GOOD, **{name: content}))
    line = str(caught.value).splitlines()[1]
    assert line.startswith(f"{name}.json: {said}")
    assert "canary" not in str(caught.value)


def test_every_bad_file_has_its_line_and_lenient_leaves_them_out(tmp_path):
    put(tmp_path, good=GOOD, **{name: content for name, (content, _) in BAD.items()})
    with pytest.raises(ValueError, match=f"{len(BAD)} of {len(BAD) + 1} files .* are no interviews") as caught:
        interviews.read(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 + len(BAD)
    found, left_out = interviews.read(tmp_path, lenient=True)
    assert [one.id for one in found] == ["good"]
    assert [line.split(".json")[0] for line in left_out] == sorted(BAD)


def test_a_folder_without_interviews_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no interview: put \*.json files"):
        interviews.read(tmp_path)
    with pytest.raises(ValueError, match="must be a folder of JSON files, got"):
        interviews.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no interview"):
        interviews.read(put(tmp_path, bad="{"), lenient=True)


# asking ---------------------------------------------------------------------------------------------------------------


def test_models_are_asked_the_dialogues_one_model_after_another_in_order(tmp_path):
    asked = []

    def answer(model, dialogues):
        asked.append((model, dialogues))
        return [{"ranked": ["I10"]} for _ in dialogues]

    interviews.run(put(tmp_path, a=GOOD, b=GOOD), ["first", "second"], answer)
    dialogue = f"Doctor: What is it?\nPatient: {CANARY}"
    assert asked == [("first", [dialogue, dialogue]), ("second", [dialogue, dialogue])]


def test_the_summary_counts_only_interviews_with_an_expected_label(tmp_path):
    put(tmp_path, a=with_label("I10"), b=with_label("e11.9"), c=with_label("J45.901"), d=GOOD)
    lines = [
        {"ranked": ["I10", "E119", "J189", "K219"], "probability": 0.75, "written": None},
        {"ranked": ["E119", "I10"], "probability": 0.5, "written": "E119"},
        {"ranked": ["I10", "J45901"], "probability": 0.25, "written": "I10"},
        {"ranked": ["K219"], "probability": 1.0, "written": None},
    ]
    result = interviews.run(tmp_path, ["m"], answers(*lines))
    (row,) = result["summary"]
    assert (row["n"], row["with_expected_label"], row["right"], row["accuracy"]) == (4, 3, 2, pytest.approx(2 / 3))
    assert row["low"] < 2 / 3 < row["high"] and row["no_valid_answer"] == 2
    assert [line["right"] for line in result["models"]["m"]] == [True, True, False, None]
    assert result["models"]["m"][0]["ranked"] == ["I10", "E119", "J189"]
    assert [row["answer"] for row in interviews.table(result)] == ["I10", "E11.9", "I10", "K21.9"]
    assert [row["expected"] for row in interviews.table(result)] == ["I10", "E11.9", "J45.901", None]


def test_without_a_ranking_the_written_label_counts_and_none_is_wrong(tmp_path):
    put(tmp_path, a=with_label("I10"), b=with_label("I10"))
    result = interviews.run(tmp_path, ["m"], answers({"written": None}, {"written": "I10"}))
    (row,) = result["summary"]
    assert (row["right"], row["accuracy"], row["no_valid_answer"]) == (1, 0.5, 1)
    assert result["models"]["m"][0]["said"] is None and result["models"]["m"][0]["right"] is False


def test_where_no_label_is_expected_there_is_no_accuracy_and_not_0(tmp_path):
    result = interviews.run(put(tmp_path, a=GOOD), ["m"], answers({"ranked": ["I10"]}))
    (row,) = result["summary"]
    assert [row[key] for key in ("right", "accuracy", "low", "high", "no_valid_answer")] == [None] * 5


def test_nothing_that_was_said_stands_in_the_result(tmp_path):
    put(tmp_path, a=with_label("I10") | {"name": CANARY})
    line = {"ranked": ["I10"], "written": None, "said": CANARY, "dialogue": CANARY}
    result = interviews.run(tmp_path, ["m"], answers(line))
    text = records.canonical_json(result)
    assert "canary" not in text and "left ear" not in text
    assert "not for diagnosis" in result["notice"]
    assert "canary" not in records.canonical_json(interviews.table(result))


def test_labels_that_are_no_codes_compare_as_they_stand(tmp_path):
    put(tmp_path, a=with_label("FAM/SOCHX"))
    result = interviews.run(tmp_path, ["m"], answers({"ranked": ["FAM/SOCHX"]}), kind="labels")
    assert result["summary"][0]["right"] == 1
    assert interviews.table(result)[0]["answer"] == "FAM/SOCHX"


def test_an_expected_label_that_no_model_knows_is_said_and_one_that_is_no_code_is_refused(tmp_path):
    put(tmp_path, a=with_label("I10"), b=with_label("Z99.9"), c=GOOD)
    line = {"ranked": ["I10"]}
    result = interviews.run(tmp_path, ["m"], answers(line, line, line), labels=("I10", "E119"))
    assert result["label_not_known_to_the_models"] == ["b"] and result["summary"][0]["right"] == 1
    put(tmp_path, c=with_label("a bad cold"))
    with pytest.raises(ValueError, match=r"c.json: expected_label 'a bad cold' is no code of ICD-10-CM"):
        interviews.run(tmp_path, ["m"], answers(line))


def test_expected_labels_that_are_no_codes_are_named_with_the_other_bad_files_and_lenient_leaves_them_out(tmp_path):
    put(tmp_path, a=with_label("I10"), b=with_label("flu"), c="{", d=with_label("cold"))
    with pytest.raises(ValueError, match="3 of 4 files") as caught:
        interviews.run(tmp_path, ["m"], answers())
    assert [line[:6] for line in str(caught.value).splitlines()[1:]] == ["b.json", "c.json", "d.json"]
    result = interviews.run(tmp_path, ["m"], answers({"ranked": ["I10"]}), lenient=True)
    assert (result["interviews"], result["summary"][0]["right"], len(result["left_out"])) == (1, 1, 3)
    assert result["left_out"][0].startswith("b.json: expected_label 'flu' is no code of ICD-10-CM; correct it, or take")
    assert (
        len(
            interviews.run(tmp_path, ["m"], answers(*[{"ranked": ["flu"]}] * 3), kind="labels", lenient=True)["models"][
                "m"
            ]
        )
        == 3
    )


def test_what_cannot_be_asked_is_refused(tmp_path):
    put(tmp_path, a=GOOD)
    with pytest.raises(ValueError, match="models must name at least one trained model"):
        interviews.run(tmp_path, [], answers())
    with pytest.raises(ValueError, match="model 'm' is named twice"):
        interviews.run(tmp_path, ["m", "m"], answers())
    with pytest.raises(ValueError, match="model 'm' gave 0 answers to 1 interviews"):
        interviews.run(tmp_path, ["m"], answers())


# the examples ---------------------------------------------------------------------------------------------------------


def test_the_examples_are_interviews_with_codes_and_words_of_the_bundled_dialogues(project_dir):
    found, left_out = interviews.read(project_dir / "examples" / "interviews")
    assert len(found) == 3 and not left_out
    known = {disease.code: disease for disease in generated_dialogues.DISEASES}
    expected = [one.expected_label for one in found if one.expected_label is not None]
    assert set(expected) <= set(known) and len(expected) == 2
    assert all(icd10.dotted(code) == code for code in expected)
    for one in found:
        if one.expected_label:
            assert any(fact in interviews.as_dialogue(one) for fact in known[one.expected_label].own)
        assert "invented" in one.name
