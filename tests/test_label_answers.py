"""Which label does a model give: ranked as separate model passes rank, written and read without guessing?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nbhelpers import label_answers, models
from nbhelpers.dialogues import Dialogue
from nbhelpers.prompts import Prompts, Wording

CODES = ("E119", "E1165", "I10", "J4520")
ROWS = tuple(
    Dialogue(id=number, position=number, text=text, labels=(label,), group=number)
    for number, (text, label) in enumerate(
        [
            ("Patient: I am thirsty.\nDoctor: Your sugar is high.", "E119"),
            ("Patient: I wheeze at night.\nDoctor: Since when? Tell me all of it, slowly.\nPatient: A week.", "J4520"),
            ("Patient: My head is heavy.", "I10"),
        ]
    )
)


@pytest.fixture(scope="module")
def loaded():
    return models.load_model("tiny-llama", device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded):
    return Prompts(loaded.tokenizer, Wording(), CODES, 256, 12)


# ------------------------------------------------------------------------------------------------ ranking


def test_labels_are_ranked_by_the_log_probability_of_label_and_end(loaded, prompts):
    """Against a plain pass of the model for each label, normalised by hand."""
    found = dict(label_answers.answered(loaded.model, prompts, ROWS, ("ranking",)))
    for number, row in enumerate(ROWS):
        sums = []
        for label in CODES:
            taught = prompts.row(row.text, label)
            with torch.no_grad():
                logs = loaded.model(input_ids=taught["input_ids"][None]).logits[0, :-1].log_softmax(-1)
            told = taught["labels"][1:]
            sums.append(sum(float(logs[at, token]) for at, token in enumerate(told.tolist()) if token != -100))
        total = math.log(sum(math.exp(value) for value in sums))
        line = found[number]
        assert line["ranked"] == [CODES[at] for at in np.argsort([-value for value in sums])]
        np.testing.assert_allclose(line["logprobs"], [value - total for value in sums], atol=1e-4)
        assert line["probability"] == pytest.approx(math.exp(max(sums) - total), abs=1e-5)


def test_labels_of_one_likelihood_keep_their_order():
    line = label_answers.ranked([-1.0, -0.5, -1.0], ["a", "b", "c"])
    assert line["ranked"] == ["b", "a", "c"]
    assert float(np.exp(line["logprobs"]).sum()) == pytest.approx(1)


def test_a_likelihood_that_is_no_number_is_no_answer():
    with pytest.raises(FloatingPointError, match="label 'b' is no number"):
        label_answers.ranked([-1.0, math.nan], ["a", "b"])


def test_that_labels_scored_together_are_scored_as_alone_is_checked(loaded, prompts):
    fact = label_answers.labels_score_as_alone(loaded.model, prompts, ROWS)
    assert fact.ok and "4 choices" in fact.saw


# ------------------------------------------------------------------------------------------------ written answers


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("E11.9", "E119"),
        (" e11.65 is it", "E1165"),
        ("The code is I10.", "I10"),
        ("Z99.2", "Z992"),  # a valid code that is no label here: an answer, and a wrong one
        ("Her B12 level is low", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_a_written_code_is_read_or_there_is_none(text, label):
    assert label_answers.read(text, "icd10", CODES) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ROS", "ROS"),
        ("ros.\nThe rest does not count: EXAM", "ROS"),
        ("It is FAM/SOCHX, I think", "FAM/SOCHX"),
        ("FAM/SOCHX", "FAM/SOCHX"),
        ("the section is PASTMEDICALHX", "PASTMEDICALHX"),
        ("either EXAM or ROS", None),  # two labels: no guess
        ("ROSE", None),
        ("", None),
    ],
)
def test_a_written_label_is_read_where_it_is_the_only_one(text, label):
    names = ("EXAM", "ROS", "FAM/SOCHX", "SOCHX", "PASTMEDICALHX", "MEDICALHX")
    assert label_answers.read(text, "labels", names) == label


def test_what_is_written_is_what_the_model_writes_greedily_after_the_same_prompt(loaded, prompts):
    found = dict(label_answers.answered(loaded.model, prompts, ROWS, ("writing",)))
    for number, row in enumerate(ROWS):
        ids = torch.tensor([prompts.prompt(row.text).ids])
        with torch.no_grad():
            whole = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text = loaded.tokenizer.decode(whole, skip_special_tokens=True).split("\n")[0]
        assert found[number]["said"] == text.strip()


def test_a_label_longer_than_new_tokens_can_be_written(loaded):
    label = "the section on medicines that were taken before and on what they did, in the words of the patient"
    made = Prompts(loaded.tokenizer, Wording(kind="labels"), (label, "other"), 256, 4)
    assert made.room == len(made.answers[label]) > 4
    with torch.no_grad():
        ids = torch.tensor([made.prompt(ROWS[0].text).ids])
        whole = loaded.model.generate(ids, max_new_tokens=made.room, do_sample=False)[0, ids.shape[1] :]
    found = dict(label_answers.answered(loaded.model, made, ROWS[:1], ("writing",)))
    assert found[0]["said"] == loaded.tokenizer.decode(whole, skip_special_tokens=True).split("\n")[0].strip()


def test_writing_ends_at_the_token_that_was_taught_as_the_end(loaded):
    made = Prompts(loaded.tokenizer, Wording(), CODES, 256, 12)
    plain = dict(label_answers.answered(loaded.model, made, ROWS[:1], ("writing",)))[0]["said"]
    third = loaded.tokenizer(f" {plain}", add_special_tokens=False)["input_ids"][2]
    made.end = third
    ended = dict(label_answers.answered(loaded.model, made, ROWS[:1], ("writing",)))[0]["said"]
    assert ended != plain and plain.startswith(ended)


# ------------------------------------------------------------------------------------------------ facts and times


def taught(prompts):
    return [prompts.row(row.text, row.labels[0]) for row in ROWS]


def test_training_rows_made_by_the_builder_are_as_asked(prompts):
    fact = label_answers.trained_as_asked(prompts, ROWS, taught(prompts))
    assert fact.ok and fact.values == {"rows": 3, "same_prompt": 3, "answer_alone": 3}


def test_another_prompt_in_training_is_reported_as_failed(prompts):
    other = Prompts(prompts.tokenizer, Wording(system="Read this."), CODES, 256, 12)
    fact = label_answers.trained_as_asked(prompts, ROWS, taught(other))
    assert not fact.ok and fact.values["same_prompt"] == 0


def test_a_prompt_in_the_loss_is_reported_as_failed(prompts):
    rows = [row | {"labels": row["input_ids"].clone()} for row in taught(prompts)]
    fact = label_answers.trained_as_asked(prompts, ROWS, rows)
    assert not fact.ok and fact.values == {"rows": 3, "same_prompt": 3, "answer_alone": 0}


def test_an_end_token_left_out_of_the_loss_is_reported_as_failed(prompts):
    rows = taught(prompts)
    rows[1]["labels"][-1] = -100
    assert not label_answers.trained_as_asked(prompts, ROWS, rows).ok


def test_latency_is_of_single_requests_without_the_first(loaded, prompts):
    found = label_answers.latency(loaded.model, prompts, ROWS, "ranking")
    assert found["n"] == 3 and 0 < found["p50"] <= found["p95"] <= found["p99"] and found["kind"] == "ranking"


def test_the_spread_is_that_of_a_ratio_with_what_was_prepared_added():
    """By pencil: r = 6 / 40, differences from it -0.5, 0, 0.5, error sqrt(3/2 * 0.5) / 40, t of 2 degrees 4.3027."""
    speed = label_answers.Speed(7.0, 4, 40, ((1.0, 10), (3.0, 20), (2.0, 10)))
    times = math.exp(4.302653 * math.sqrt(0.75) / 40 / (6 / 40))
    assert speed.spread() == {
        "low": pytest.approx((1 + 6 / times) / 4, rel=1e-6),
        "high": pytest.approx((1 + 6 * times) / 4, rel=1e-6),
        "parts": 3,
    }
    assert speed.record()["spread"]["low"] < speed.record()["seconds_per_dialogue"] == 1.75
    assert label_answers.Speed(7.0, 4, 40, ((6.0, 40),)).record()["spread"] is None, "one part shows no spread"


def test_the_spread_holds_the_rate_in_95_of_100_measurements():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        tokens = generator.integers(50, 100, 6)
        seconds = 0.01 * tokens * generator.normal(1, 0.1, 6)
        found = label_answers.Speed(sum(seconds), 6, sum(tokens), tuple(zip(seconds, tokens, strict=True))).spread()
        hits += found["low"] <= 0.01 * sum(tokens) / 6 <= found["high"]
    assert 920 <= hits <= 980


def timed(kind, monkeypatch, passes, tokens=(1,) * 200):
    """The speed of work that prepares for 5 s and then does `passes` (seconds, answers), and is waited with for 9 s."""
    now = [100.0]
    monkeypatch.setattr(label_answers.time, "perf_counter", lambda: now[0])
    clock = label_answers.Clock(kind, tokens)

    def work():
        now[0] += 5
        number = 0
        for seconds, answers in passes:
            assert not clock.should_stop()
            now[0] += seconds
            for _ in range(answers):
                yield number, None
                number += 1

    for _ in clock.running(work()):
        now[0] += 9
    return clock.speed()


def test_a_part_of_rankings_is_a_pass_and_what_is_done_with_answers_is_not_timed(monkeypatch):
    speed = timed("ranking", monkeypatch, [(2, 2), (3, 1), (1, 0), (4, 2)], tokens=(10, 20, 30, 40, 50))
    assert speed == label_answers.Speed(15.0, 5, 150, ((2.0, 30), (3.0, 30), (5.0, 90)))
    assert timed("ranking", monkeypatch, [(2, 2), (1, 0)]).parts == ((3.0, 2),), "a pass without an answer"


def test_a_part_of_texts_is_as_many_as_are_written_side_by_side(monkeypatch):
    speed = timed("writing", monkeypatch, [(1, 60), (1, 5), (1, 64), (1, 3)])
    assert speed.parts == ((2.0, 65), (2.0, 67)) and speed.seconds == 9
    assert timed("writing", monkeypatch, [(1, 60)]).record()["spread"] is None


def test_the_clock_hands_on_that_somebody_wants_to_stop():
    assert label_answers.Clock("ranking", (), lambda: True).should_stop()


@pytest.mark.parametrize(("kind", "parts"), [("ranking", 3), ("writing", 1)])
def test_the_work_itself_says_where_its_passes_end(loaded, prompts, kind, parts):
    """A row a pass; three texts are written side by side."""
    clock = label_answers.Clock(kind, [len(prompts.prompt(row.text).ids) for row in ROWS])
    found = label_answers.answered(loaded.model, prompts, ROWS, (kind,), batch_tokens=1, should_stop=clock.should_stop)
    assert len(dict(clock.running(found))) == 3
    speed = clock.speed()
    assert len(speed.parts) == parts and sum(seconds for seconds, _ in speed.parts) <= speed.seconds
    assert speed.prompt_tokens == sum(tokens for _, tokens in speed.parts) == sum(clock.tokens)
