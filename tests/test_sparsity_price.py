"""Is what a plan costs counted as a pencil counts it?"""

from __future__ import annotations

import pytest

from nbhelpers import models, sparsity_price, sweep
from nbhelpers.sparsity import SparsityConfig


def configs(**changes) -> list[dict]:
    """Dense, and 50 % in two modes."""
    base = {"model": "tiny-llama", "task": "boolq", "steps": 10, "limit": 20} | changes
    both = [{"sparsity": 0.5, "mode": mode} for mode in ("sparse_to_dense", "sparse_to_sparse")]
    return [SparsityConfig(**base | values).model_dump() for values in ({"sparsity": 0}, *both)]


def test_both_modes_of_a_mask_share_one_answer_before_tuning():
    found = sparsity_price.price(configs())
    assert {name: found[name] for name in ("trainings", "evaluations", "loads", "scorings")} == {
        "trainings": 3,
        "evaluations": 3 + 1 + 1,
        "loads": 1,
        "scorings": 1,
    }


def test_a_mask_that_no_seed_decides_is_answered_once_for_all_seeds():
    several = [config | {"seed": seed} for seed in (0, 1, 2) for config in configs()]
    assert sparsity_price.price(several)["evaluations"] == 9 + 1 + 1
    drawn = [config | {"importance": "random"} for config in several]
    assert sparsity_price.price(drawn)["evaluations"] == 9 + 1 + 3


def test_disk_grows_by_what_is_kept_and_by_nothing_else():
    alone = sparsity_price.price(configs())["disk_bytes"]
    records = 3 * (sparsity_price.RUN_BYTES + 2 * 20 * sparsity_price.ANSWER_BYTES + 10 * sparsity_price.STEP_BYTES)
    weights = sum(p.numel() for p in models.load_model("tiny-llama").model.parameters() if p.ndim == 2)
    assert 0 < alone - records < weights / 2, "one set of masks, four bits a weight of the projections"
    kept = sparsity_price.price(configs(keep_model=True, dtype="float32"))["disk_bytes"]
    model = models.load_model("tiny-llama").model
    assert kept - alone == 3 * 4 * sum(p.numel() for p in model.parameters())
    assert sparsity_price.price(configs(checkpoint_every=5))["disk_bytes"] > alone


def test_what_nobody_knows_before_is_not_guessed():
    found = sparsity_price.price(configs(model="somebody/some-model"))
    assert found["downloads"] == {"somebody/some-model": None} and found["disk_bytes"] is None
    assert any("somebody/some-model is not in the catalogue and not here" in note for note in found["notes"])


def test_rows_on_the_hub_are_as_many_as_the_card_of_their_data_set_says():
    def answers(**changes) -> int:
        few = sparsity_price.price(configs(data=None, limit=1) + configs(data=None, limit=1, task="gsm8k"))
        many = sparsity_price.price(configs(data=None, **changes) + configs(data=None, limit=1, task="gsm8k"))
        return (many["disk_bytes"] - few["disk_bytes"]) // (3 * 2 * sparsity_price.ANSWER_BYTES)

    assert answers(limit=None) == 3_270 - 1 and answers(limit=7) == 7 - 1 and answers(limit=10**6) == 3_270 - 1
    (note,) = sparsity_price.price(configs(data=None) + configs(data=None, task="hellaswag"))["notes"]
    assert note == "evaluation rows on the hub, by the card of each data set: boolq 3,270, hellaswag 10,042"


@pytest.mark.parametrize("name", ["calibration_rows", "window", "train_data", "seed", "dtype", "dimension"])
def test_jobs_share_a_scoring_only_where_nothing_that_decides_it_differs(name, tmp_path):
    other = {"calibration_rows": 5, "window": 32, "train_data": "x.jsonl", "seed": 3, "dtype": "bfloat16"}
    other |= {"dimension": "inputs"}
    base = {"importance": "wanda", "pattern": "structured"}

    def scorings(importance: str) -> int:
        changed = configs(**base | {"importance": importance, name: other[name]})
        return sparsity_price.price(configs(**base | {"importance": importance}) + changed)["scorings"]

    assert scorings("wanda") == 2
    assert scorings("magnitude") == (2 if name in ("dtype", "dimension") else 1), "it looks at no data"


def test_sparsities_of_one_ranking_are_scored_once_and_once_more_where_a_set_is_full():
    def priced(sparsities) -> dict:
        one = configs()[-1]
        return sparsity_price.price([one | {"sparsity": share} for share in sparsities])

    assert priced([0, 0.15, 0.25, 0.35, 0.95])["scorings"] == 1
    assert priced([n / 20 for n in range(20)])["scorings"] == 2


@pytest.mark.parametrize(
    "seconds, hours",
    [
        ([3600.0] * 4, {"1": 4, "2": 2, "4": 1, "8": 1}),
        ([7200.0, 3600, 3600], {"1": 4, "2": 2, "4": 2, "8": 2}),
        ([3600.0, 3600, 7200], {"1": 4, "2": 3, "4": 2, "8": 2}),  # the long one comes last
        ([], {"1": 0, "2": 0, "4": 0, "8": 0}),
    ],
)
def test_hours_by_workers_are_those_of_taking_the_next_job_once_free(seconds, hours):
    assert sweep.hours_by_workers(seconds) == hours
