"""Does a filter keep exactly the runs that it describes, and say what it does not understand?"""

from __future__ import annotations

import pytest
from many_runs import a_run

from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.selection import Condition, parse, select


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    """a: lr 0.1, rank 8, last loss 1; b: lr 0.01, last loss 2; c: another kind, failed."""
    place = tmp_path_factory.mktemp("runs")
    a_run(place / "a", (3.0, 1.0), {}, name="warm start", lr=0.1, lora={"rank": 8}, model="tiny-llama", on=True)
    a_run(place / "b", (2.0,), {}, name="cold start", lr=0.01, model="tiny-gpt2", on=False)
    a_run(place / "c", (), name="other", kind="probe", status="failed", lr=None)
    return ExperimentAnalyzer(place)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", "abc"),
        ("start", "ab"),
        ("COLD start", "b"),
        ("lr=0.10", "a"),
        ("lr=0.1,0.01", "ab"),
        ("lr!=0.1", "bc"),
        ("lr<0.05", "b"),
        ("lr>=0.01 lr<0.1", "b"),
        ("lora.rank=8", "a"),
        ("on=true", "a"),
        ("lr=none", "c"),
        ("train_loss<1.5", "a"),
        ("status=failed", "c"),
        ("kind=probe,test name!=other", "ab"),
        ("'name=cold start'", "b"),
        ("start lr>5", ""),
    ],
)
def test_a_filter_keeps_the_runs_that_it_describes(analyzer, text, kept):
    assert sorted(run.folder.name for run in select(analyzer, text).experiments) == list(kept)


def test_kind_model_and_status_are_taken_whole(analyzer):
    assert [run.folder.name for run in select(analyzer, model="tiny-gpt2").experiments] == ["b"]
    assert select(analyzer, model="tiny").experiments == []
    assert [run.folder.name for run in select(analyzer, kind="probe", status="failed").experiments] == ["c"]


def test_a_filter_is_read_again_with_the_runs(tmp_path):
    a_run(tmp_path / "a", (1.0,), {}, lr=1)
    kept = select(ExperimentAnalyzer(tmp_path), "lr=1")
    assert len(kept.experiments) == 1
    a_run(tmp_path / "b", (1.0,), {}, lr=1)
    a_run(tmp_path / "c", (1.0,), {}, lr=2)
    assert [run.folder.name for run in kept.load_all()] == ["a", "b"]


def test_an_unknown_field_is_named_with_the_nearest_one(analyzer):
    with pytest.raises(LookupError, match="unknown field 'lora.rnk'. Did you mean 'lora.rank'"):
        select(analyzer, "lora.rnk=8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name='cold", "opens a quotation mark"),
        ("=3", "says no field"),
        ("lr <3", "says no field"),
        ("lr>high", "needs a number after >"),
    ],
)
def test_a_text_that_cannot_be_read_says_how_to_write_it(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_text_is_words_and_conditions():
    assert parse("a b.c<=1e-3") == [Condition("a"), Condition("1e-3", "b.c", "<=")]
