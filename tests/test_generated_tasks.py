"""Are the bundled rows true to themselves, balanced, disjoint, and within what the bundled models read?"""

from __future__ import annotations

import re
from collections import Counter

import pytest

from nbhelpers import data, generated_tasks, models, tasks
from nbhelpers import generated_words as words

NEW_TOKENS = 64
BUNDLED_MODELS = ("tiny-gpt2", "tiny-opt", "tiny-pythia", "tiny-llama", "small-llama")


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, str], tasks.Rows]:
    return {(name, split): tasks.read(name, "bundled", split) for name in tasks.TASKS for split in tasks.SPLITS}


def fields(rows: tasks.Rows) -> list[dict]:
    return [row.fields for row in rows.rows]


def test_an_answer_follows_from_what_the_passage_says_of_the_person(told):
    for row in fields(told["boolq", "evaluation"]):
        relation, name, value = next(
            (relation, found[1], found[2])
            for relation in words.RELATIONS
            if (found := re.fullmatch(relation.asked.lower().replace("{}", "(.+)"), row["question"], re.IGNORECASE))
        )
        (said,) = (line for line in row["passage"].split(". ") if line.startswith(f"{name} "))
        assert value in said
        assert row["label"] == int("does not" not in said), row
        assert said.rstrip(".").startswith(f"{name} {relation.stated.split('{}')[0]}") == bool(row["label"])


def test_the_right_ending_names_the_thing_that_the_person_had(told):
    for row in fields(told["hellaswag", "evaluation"]):
        had = dict(re.findall(r"(\w+) had a (\w+)\.", row["ctx_a"]))
        ends = [re.fullmatch(r"(\w+) looked for the (\w+)\.", ending).groups() for ending in row["endings"]]
        assert [at for at, (name, thing) in enumerate(ends) if had[name] == thing] == [row["label"]]
        assert len(set(ends)) == 4


def test_the_steps_of_a_problem_are_right_and_lead_to_its_number(told):
    for row in fields(told["gsm8k", "evaluation"]):
        total = int(re.search(r"has (\d+) ", row["question"])[1])
        changes = re.findall(r"(buys|eats) (\d+) ", row["question"])
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", row["answer"])
        assert len(changes) == len(steps)
        for (does, number), (before, sign, by, after) in zip(changes, steps, strict=True):
            assert (int(before), sign, by) == (total, {"buys": "+", "eats": "-"}[does], number)
            total += int(number) if does == "buys" else -int(number)
            assert int(after) == total > 0
        assert row["answer"].endswith(f"\n#### {total}")


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("name, labels", [("boolq", 2), ("hellaswag", 4)])
def test_labels_are_balanced_and_so_are_those_of_the_first_rows(told, name, labels, split):
    found = [row["label"] for row in fields(told[name, split])]
    for part in (found, found[:100]):
        assert Counter(part) == {label: len(part) // labels for label in range(labels)}


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_no_row_of_one_part_stands_in_the_other_nor_twice_in_its_own(told, name):
    train, evaluation = (told[name, split] for split in tasks.SPLITS)
    documents = [document for rows in (train, evaluation) for document in tasks.training_documents(rows)]
    prompts = [document.prompt or document.text for document in documents]
    assert len(set(prompts)) == len(prompts) == 3500
    assert tasks.training_parts(train, evaluation).overlap == 0


def test_a_row_that_was_told_is_not_told_again():
    numbers = iter([1, 1, 2, *range(3, 5000)])
    rows = generated_tasks.rows(lambda dice, number: {"question": next(numbers)}, "train")
    assert rows[0] == {"question": 501} and len(rows) == 3000


def test_how_many_of_the_others_do_as_the_one_asked_about_is_as_often_as_said(told):
    agreeing = Counter()
    for row in fields(told["boolq", "train"]):
        does = 3 - row["passage"].count("does not")
        agreeing[does - 1 if row["label"] else 2 - does] += 1
    shares = [agreeing[count] / 3000 for count in range(3)]
    assert shares == pytest.approx([0.35, 0.15, 0.5], abs=0.03)  # 0.5 x (1 - 0.3), 0.5 x 0.3, AGREEING


def test_counting_tells_most_questions_but_not_by_more_or_less(told):
    """The best that the number of `does not` alone can tell, and the best rule of the kind `so many or more: no`."""
    labels = {count: Counter() for count in range(4)}
    for row in fields(told["boolq", "train"]):
        labels[row["passage"].count("does not")][row["label"]] += 1
    counted = sum(max(found.values()) for found in labels.values()) / 3000
    more = [sum(found[int(count < limit)] for count, found in labels.items()) / 3000 for limit in range(5)]
    assert counted == pytest.approx(0.85, abs=0.03) and max(more) == pytest.approx(0.75, abs=0.03)


def test_some_endings_can_only_be_told_by_who_had_what(told):
    own = sum(
        any(f" {ending.split()[-1]}" in row["ctx_a"] for at, ending in enumerate(row["endings"]) if at != row["label"])
        for row in fields(told["hellaswag", "evaluation"])
    )
    assert 25 < own < 60  # 8 % of 500


def test_bundled_rows_are_stamped_and_always_the_same(told):
    for (name, split), rows in told.items():
        assert rows.generated and tasks.protocol(rows)["generated"] and rows.split == split
        assert tasks.read(name, "bundled", split).sha256 == rows.sha256
    assert len({rows.sha256 for rows in told.values()}) == len(told) == 8


@pytest.mark.parametrize("model", BUNDLED_MODELS)
def test_prompts_and_answers_are_short_and_of_whole_words_for_the_bundled_tokenizers(told, model):
    tokenizer = models.load_tokenizer(model)
    for name in (name for name in tasks.TASKS if tasks.find(name).kind != "rolling"):  # texts are read in windows
        for document in tasks.training_documents(told[name, "evaluation"])[:200]:
            row = data.completion_row(tokenizer, document, 256)
            assert len(row["input_ids"]) < 200 - NEW_TOKENS
            assert len(row["input_ids"]) - row["prompt_length"] < NEW_TOKENS


def test_solved_problems_before_a_bundled_one_can_be_asked_for_too(told):
    asked = tasks.documents(told["gsm8k", "evaluation"], shots=2, shots_rows=told["gsm8k", "train"], limit=3)
    assert [document.context.count("Question:") for document in asked] == [3, 3, 3]
