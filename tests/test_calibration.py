"""Are calibration rows drawn from the training part alone, by the seed, and known by their tokens?"""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from model_fixtures import make_tokenizer

from nbhelpers import data, importance, models, tasks
from nbhelpers.calibration import calibration, fingerprint

pytest_plugins = ["model_fixtures"]

TASK = "task:boolq:bundled"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=False)


def texts(tokenizer, found) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in found.rows]


def test_a_text_gives_windows_of_its_training_part_and_no_other(tokenizer, text_file):
    found = calibration(tokenizer, str(text_file), number=12, window=32)
    corpus = data.load_corpus(str(text_file))
    train = tokenizer.decode(data.token_stream(tokenizer, corpus.train))
    windows = texts(tokenizer, found)
    assert len(windows) == 12 == len(set(windows)) and all(text in train for text in windows)
    assert found.tokens == 12 * 32 and found.scored == 12 * 31
    other = tokenizer.decode(data.token_stream(tokenizer, [*corpus.validation, *corpus.test]))
    assert not any(text in other for text in windows)


def test_a_task_gives_rows_of_its_training_part_with_the_loss_on_the_answer(tokenizer):
    found = calibration(tokenizer, TASK, number=20, window=400)
    train = {document.prompt + document.text for document in tasks.load_corpus(TASK).train}
    ends = [text.removesuffix("</s>") for text in texts(tokenizer, found)]
    assert len(ends) == 20 and all(text in train for text in ends)
    assert found.scored == sum(int((row["labels"] != -100).sum()) for row in found.rows) < found.tokens / 5
    assert found.generated


@pytest.mark.parametrize("source", ["bundled", TASK])
def test_the_seed_chooses_the_rows_and_nothing_else_does(tokenizer, source):
    first, again, other = (calibration(tokenizer, source, number=8, window=300, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(set(texts(tokenizer, first)) & set(texts(tokenizer, other))) < 8
    fewer = calibration(tokenizer, source, number=4, window=300)
    assert texts(tokenizer, fewer) == texts(tokenizer, first)[:4]


def test_the_global_generator_is_left_alone(tokenizer):
    state = torch.get_rng_state()
    calibration(tokenizer, TASK, number=4, window=400)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fingerprint_is_the_sha256_of_lengths_ids_and_labels():
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])}]
    by_hand = hashlib.sha256(b"3 " + struct.pack("<3q", 5, 6, 7) + struct.pack("<3q", -100, 6, 7)).hexdigest()
    assert fingerprint(rows) == by_hand
    assert fingerprint([{**rows[0], "input_ids": rows[0]["input_ids"].int()}]) == by_hand


@pytest.mark.parametrize(
    "ids, labels",
    [
        ([[5, 6, 8]], [[-100, 6, 7]]),
        ([[5, 6, 7]], [[5, 6, 7]]),
        ([[5, 6], [7]], [[-100, 6], [7]]),
        ([[5, 6, 7]] * 2, [[-100, 6, 7]] * 2),
    ],
    ids=["another token", "another label", "another cut", "another row"],
)
def test_whatever_changes_a_score_changes_the_fingerprint(ids, labels):
    first = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])}]
    rows = [{"input_ids": torch.tensor(a), "labels": torch.tensor(b)} for a, b in zip(ids, labels, strict=True)]
    assert fingerprint(rows) != fingerprint(first)


def test_two_tasks_differ_in_fingerprint_and_in_the_scores_made_on_them():
    loaded = models.load_model("tiny-llama", device="cpu", dtype="float32")
    found = [calibration(loaded.tokenizer, f"task:{name}:bundled", number=4, window=128) for name in ("boolq", "gsm8k")]
    assert found[0].fingerprint != found[1].fingerprint
    orders = [
        next(score for _, score in importance.scores(loaded.model, "taylor", one.rows)).flatten().argsort()
        for one in found
    ]
    assert not torch.equal(*orders)


def test_a_record_of_it_holds_no_text(tokenizer):
    found = calibration(tokenizer, TASK, number=3, window=400, seed=2)
    assert found.as_dict() == {
        "source": TASK,
        "seed": 2,
        "window": 400,
        "tokens": found.tokens,
        "scored": found.scored,
        "fingerprint": found.fingerprint,
        "generated": True,
        "rows": 3,
    }


def test_too_few_rows_are_refused_and_not_made_do_with(tokenizer, text_file):
    with pytest.raises(ValueError, match=r"has \d+ calibration rows, fewer than 100000; ask for fewer"):
        calibration(tokenizer, str(text_file), number=100_000, window=32)
    with pytest.raises(ValueError, match=r"training part of 'task:boolq:bundled' has \d+ calibration rows, fewer than"):
        calibration(tokenizer, TASK, number=100_000, window=400)
    with pytest.raises(ValueError, match="number of calibration rows must be at least 1, got 0"):
        calibration(tokenizer, TASK, number=0)
    with pytest.raises(LookupError, match="does not exist"):
        calibration(tokenizer, "nowhere.txt")
