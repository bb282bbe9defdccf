"""Does a run mask, tune, merge and measure what it says, share what jobs have in common, and catch its own faults?"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from nbhelpers import (
    evaluation,
    importance,
    mask_sets,
    masked_adapters,
    masked_training,
    masks,
    models,
    shared_models,
    sparsity,
    sweep,
)
from nbhelpers.grid import expand, read_plan
from nbhelpers.jobkinds import sparsity_columns
from nbhelpers.records import read_lines
from nbhelpers.runs import read_run
from nbhelpers.sparsity import SparsityConfig, SparsityExperiment
from nbhelpers.tracking import Interrupted

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"model": "tiny-gpt2", "task": "boolq", "limit": 8, "steps": 3, "batch_size": 4, "device": "cpu"}


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    shared_models.release()
    mask_sets.release()


def run(folder, **changes) -> dict:
    return SparsityExperiment.run(SparsityConfig(**QUICK | changes), run_dir=folder)


def failed(result: dict) -> list[str]:
    return [fact["name"] for fact in result["facts"] if not fact["ok"]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A sparse-to-sparse run that saved its model."""
    return run(tmp_path_factory.mktemp("kept") / "run", keep_model=True)


def test_a_run_measures_three_times_and_proves_its_mask(kept):
    assert kept["all_facts_hold"] and kept["mask"]["sparsity"] == 0.5 and kept["merge"]["violations"] == 0
    names = {fact["name"] for fact in kept["facts"]}
    assert names >= {
        "mask_leaves_out_as_many_as_asked",
        "merged_model_computes_the_same",
        "masked_weights_are_zero_after_merging",
        "deltas_were_masked_by_the_stored_mask",
        "mask_holds_in_the_evaluated_model",
        "test_text_was_not_trained_on",
        "loss_is_on_the_completion_alone",
    }
    assert all(0 <= kept[stage]["acc"] <= 1 and kept[stage]["n"] == 8 for stage in ("dense", "masked", "tuned"))
    assert kept["protocol"]["generated"] and kept["text"]["generated"]
    assert sum(kept["seconds"][name] for name in ("loading", "masking", "evaluating", "training")) <= (
        kept["seconds"]["total"] + kept["seconds"]["loading"] + 0.01
    )


def test_the_saved_model_has_the_zeros_of_the_mask_and_gives_the_answers_of_the_record(kept):
    loaded = models.load_model(kept["run_dir"], device="cpu", dtype="float32")
    own = models.load_model("tiny-gpt2", device="cpu", dtype="float32")
    wanted = masks.create(own.model, masks.weights(own.model), 0.5, scope="layer", absolute=True).mask(0.5)
    found = masks.verify(loaded.model, wanted)
    assert found["ok"] and found["masked"] == kept["mask"]["masked"] == kept["mask"]["numbers"] // 2
    again = evaluation.evaluate(loaded.model, loaded.tokenizer, "boolq", "bundled", limit=8)
    lines = read_lines(f"{kept['run_dir']}/predictions.jsonl")[0]
    assert [line["id"] for line in lines] == [line["id"] for line in again["predictions"]]
    for line, other in zip(lines, again["predictions"], strict=True):
        assert line["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)


def test_what_was_learned_may_fill_the_zeros_only_in_sparse_to_dense(tmp_path):
    sparse = run(tmp_path / "a" / "run", mode="sparse_to_sparse", sparsity=0.9)
    dense = run(tmp_path / "b" / "run", mode="sparse_to_dense", sparsity=0.9)
    assert sparse["mask"]["sha256"] == dense["mask"]["sha256"]
    assert sparse["masked"]["acc"] == dense["masked"]["acc"]
    assert sparse["merge"]["violations"] == 0 < dense["merge"]["violations"]
    assert sparse["validation_nll"] != dense["validation_nll"] and dense["all_facts_hold"]
    assert "mask_holds_in_the_evaluated_model" not in {fact["name"] for fact in dense["facts"]}


def test_the_lent_model_comes_back_bit_for_bit_and_is_loaded_once(tmp_path, monkeypatch):
    loads = []
    own = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a, **k: loads.append(a) or own(*a, **k))
    before = own("tiny-gpt2", device="cpu").model.state_dict()
    for number, changes in enumerate(({}, {"sparsity": 0.9, "mode": "sparse_to_dense"}, {"sparsity": 0})):
        run(tmp_path / "s" / str(number), **changes)
        with shared_models.lent("tiny-gpt2", device="cpu", dtype="auto") as loaded:
            after = loaded.model.state_dict()
            assert set(after) == set(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert not any(parameter.grad is not None for parameter in loaded.model.parameters())
    assert len(loads) == 1


def test_an_error_gives_the_lent_model_up():
    with pytest.raises(RuntimeError, match="half done"), shared_models.lent("tiny-gpt2", device="cpu", dtype="auto"):
        raise RuntimeError("half done")
    assert not shared_models._held


def test_scores_of_one_task_never_serve_another_and_those_of_one_serve_all_its_sparsities(tmp_path):
    found = {}
    for task in ("boolq", "hellaswag"):
        for level in (0.5, 0.8):
            found[task, level] = run(
                tmp_path / "s" / f"{task}{level}", task=task, sparsity=level, importance="taylor", tuning="none"
            )
            mask_sets.release()  # as in a process of its own
    came = {key: result["mask"]["came"] for key, result in found.items()}
    assert came == {
        ("boolq", 0.5): "measured",
        ("boolq", 0.8): "cached",
        ("hellaswag", 0.5): "measured",
        ("hellaswag", 0.8): "cached",
    }
    assert found["boolq", 0.5]["mask"]["scored_on"] != found["hellaswag", 0.5]["mask"]["scored_on"]
    assert found["boolq", 0.5]["mask"]["sha256"] != found["hellaswag", 0.5]["mask"]["sha256"]
    assert len(list((tmp_path / "s" / ".masks").glob("*.safetensors"))) == 2
    assert all(result["all_facts_hold"] for result in found.values())


def test_answers_before_tuning_are_given_once_for_both_modes_and_the_dense_ones_for_all(tmp_path):
    modes = [run(tmp_path / "s" / mode, mode=mode) for mode in ("sparse_to_dense", "sparse_to_sparse")]
    assert [result["dense"]["came"] for result in modes] == ["measured", "cached"]
    assert [result["masked"]["came"] for result in modes] == ["measured", "cached"]
    other = run(tmp_path / "s" / "other", sparsity=0.3)
    assert (other["dense"]["came"], other["masked"]["came"]) == ("cached", "measured")


def test_runs_of_one_commit_of_a_hub_model_share_answers_and_masks_and_those_of_another_do_not(tmp_path, monkeypatch):
    """By the commit alone: the weights of a hub model are not read once more to tell them apart."""
    commit = ["0123abcd"]
    monkeypatch.setattr(models, "files_fingerprint", lambda name: None)
    monkeypatch.setattr(models, "hub_commit", lambda name: commit[-1])
    monkeypatch.setattr(mask_sets.models, "fingerprint", lambda model: pytest.fail("all weights were hashed"))
    how = {"tuning": "none", "limit": 2}
    found = [run(tmp_path / "s" / "a", **how), run(tmp_path / "s" / "b", **how, mode="sparse_to_dense")]
    commit.append("4567ef89")
    mask_sets.release()
    found.append(run(tmp_path / "s" / "c", **how))
    came = [[one[part]["came"] for part in ("dense", "masked", "mask")] for one in found]
    assert came == [["measured"] * 3, ["cached"] * 3, ["measured"] * 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "structured", "dimension": "outputs"},
        {"pattern": "structured", "dimension": "inputs"},
        {"pattern": "structured", "dimension": "channels"},
        {"pattern": "structured", "scope": "global"},
        {"pattern": "nm"},
        {"scope": "row"},
        {"scope": "global"},
        {"importance": "random", "sparsity": 0.37},
        {"importance": "wanda", "scope": "row"},
        {"importance": "random", "scope": "global"},
        {"importance": "gradient", "scope": "global"},
        {"sparsity": 1},
    ],
)
def test_every_pattern_scope_and_importance_leaves_out_what_was_asked_for(changes, tmp_path):
    found = run(tmp_path / "s" / "run", tuning="none", limit=2, calibration_rows=4, **changes)
    assert found["all_facts_hold"], found["facts"]
    assert found["tuned"] == found["masked"] and found["merge"] is None
    (fact,) = (fact for fact in found["facts"] if fact["name"] == "mask_leaves_out_as_many_as_asked")
    assert fact["values"]["gone"] == fact["values"]["asked"]
    if found["pattern"] != "structured":
        gone, numbers = found["mask"]["masked"], found["mask"]["numbers"]
        assert fact["saw"].startswith(f"{gone:,} of {numbers:,} weights, asked {gone:,}")
    assert found["scope"] == found["mask"]["scope"]


# ------------------------------------------------------------------------------------------------ faults built in


def test_a_mask_with_a_weight_too_few_is_reported(tmp_path, monkeypatch):
    own = masks.create

    def careless(*arguments, **options):
        levels = own(*arguments, **options)
        name = next(iter(levels.packed))
        levels.packed[name][0] = 0x99  # two weights are kept at all levels
        levels.packed[name][1:40] = 0x99
        return levels

    monkeypatch.setattr(masks, "create", careless)
    assert failed(run(tmp_path / "s" / "run", tuning="none"))[:1] == ["mask_leaves_out_as_many_as_asked"]


def test_a_mask_that_is_not_of_the_pattern_is_reported_though_its_number_is_right(monkeypatch, tmp_path):
    own = masks.create

    def single_weights(model, scores, sparsities, **options):
        made = own(model, scores, sparsities, scope="layer", absolute=True)
        return masks.Levels(made.sparsities, made.shapes, made.packed, options)

    monkeypatch.setattr(masks, "create", single_weights)
    assert failed(run(tmp_path / "s" / "a", tuning="none", pattern="nm", limit=2)) == [
        "mask_leaves_out_as_many_as_asked"
    ]
    structured = {"pattern": "structured", "dimension": "channels"}
    assert failed(run(tmp_path / "s" / "b", tuning="none", limit=2, **structured)) == [
        "mask_leaves_out_as_many_as_asked"
    ]


def test_channels_that_are_written_but_not_read_are_reported():
    loaded = models.load_model("tiny-llama", device="cpu", dtype="float32").model
    wanted = mask_sets.Wanted("structured", "magnitude", "layer", "channels", 0)
    options = {"pattern": "structured", "scope": "layer", "dimension": "channels", "absolute": True}
    whole = masks.create(loaded, masks.weights(loaded), 0.5, **options)
    assert mask_sets.Chosen(whole, 0.5, wanted, None, "measured").fact(loaded).ok
    mask = whole.mask()
    name = "model.layers.1.mlp.gate_proj.weight"
    mask[name] = mask[name].roll(1, 0)  # as many rows, but other ones
    torn = masks.Levels((0.5,), whole.shapes, masks.pack(mask).packed, whole.how)
    found = mask_sets.Chosen(torn, 0.5, wanted, None, "measured").fact(loaded)
    assert not found.ok and found.values["wrong"] == [name]


def test_peft_s_own_merge_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(masked_adapters, "attach", lambda layer, bits: None)  # plain LoRA layers: plain delta and merge
    found = failed(run(tmp_path / "s" / "run"))
    assert "masked_weights_are_zero_after_merging" in found and "mask_holds_in_the_evaluated_model" in found


def test_weights_that_come_alive_between_merge_and_evaluation_are_reported(tmp_path, monkeypatch):
    own = masked_training.merge

    def careless(trainable, row):
        found = own(trainable, row)
        with torch.no_grad():
            for parameter in trainable.parameters():
                parameter.add_(1e-3)
        return found

    monkeypatch.setattr(masked_training, "merge", careless)
    assert failed(run(tmp_path / "s" / "run")) == ["mask_holds_in_the_evaluated_model"]


# ------------------------------------------------------------------------------------------------ configs and sweeps


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mode": "dense"}, "mode 'dense' has no mask: sparsity must be 0, got 0.5"),
        ({"importance": "wnada"}, "unknown importance 'wnada'. Did you mean 'wanda'"),
        ({"pattern": "structured", "scope": "row"}, "unknown scope of pattern 'structured' 'row'"),
        ({"dimension": "inputs"}, "dimension is of pattern 'structured', got 'inputs' with 'unstructured'"),
        ({"sparsity": 1.5}, "less than or equal to 1"),
        ({"pattern": "nm", "sparsity": 0.9}, "sparsity must be a multiple of 0.25, got 0.9"),
        ({"task": "perplexity"}, "task 'perplexity' asks nothing, so there is no accuracy"),
        ({"task": "bolq"}, "unknown task 'bolq'. Did you mean 'boolq'"),
    ],
)
def test_nonsense_is_refused_at_birth(changes, said):
    with pytest.raises((ValueError, LookupError), match=said):
        SparsityConfig(**QUICK | changes)


def test_a_file_of_evaluation_rows_needs_one_of_training_rows_and_their_overlap_is_left_out(tmp_path):
    rows = [{"passage": f"Jane has {n} bells.", "question": "does jane ring", "label": n % 2} for n in range(60)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="name a file of training rows as train_data"):
        sparsity.training_text(SparsityConfig(**QUICK | {"data": str(tmp_path / "eval.jsonl")}))
    files = {"data": str(tmp_path / "eval.jsonl"), "train_data": str(tmp_path / "train.jsonl")}
    corpus = sparsity.training_text(SparsityConfig(**QUICK | files))
    assert corpus.left_out == 6 and len(corpus.train) + len(corpus.validation) == 54 and not corpus.generated


def test_more_calibration_rows_than_there_are_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"calibration_rows must be at most the \d+ training rows there are, got 100000"
    ):
        run(tmp_path / "s" / "run", importance="wanda", calibration_rows=100_000, tuning="none")


def test_the_record_names_the_precision_and_device_that_were_used_and_how_the_answers_came(tmp_path):
    first = run(tmp_path / "s" / "a", tuning="none", limit=2)
    second = run(tmp_path / "s" / "b", tuning="none", limit=2)
    for found, came in ((first, "measured"), (second, "cached")):
        told = {name: found["protocol"][name] for name in ("dtype", "device", "came")}
        assert told == {"dtype": "float32", "device": "cpu", "came": came}


def test_jobs_that_mean_the_same_are_one_and_dense_ones_come_first():
    axes = {"sparsity": [0.3, 0.9, 0, 0.5], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    plan = read_plan({"kind": "sparsity", "base": {"task": "boolq"}, "axes": axes})
    found = expand(plan)
    assert len(found.jobs) == 7, "at sparsity 0 the mode says nothing, also where the plan has no alias"
    order = [job["name"] for job in sweep.preview(plan)["order"]]
    assert [name.split()[1] for name in order] == ["0", "0.5", "0.5", "0.9", "0.9", "0.3", "0.3"]


def test_the_plans_of_the_suite_count_their_rows_and_can_be_read_without_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, rows, jobs in (("sparsity_12", 12, 9), ("sparsity_360", 360, 330), ("sparsity_7b", 360, 330)):
        found = sweep.preview(f"plans/{name}.yaml")
        assert (found["rows"], found["jobs"]) == (rows, jobs)
        assert " sparsity 0 " in f" {found['order'][0]['name']} "


def test_a_plan_says_what_it_will_do_in_all():
    found = sweep.preview("plans/sparsity_360.yaml")["price"]
    assert 5e7 < found.pop("disk_bytes") < 3e8
    before = 2 * 3 * 3 * 9  # model, task, method, sparsity: one evaluation for both modes
    assert found == {
        "trainings": 330,
        "evaluations": 330 + 2 * 3 + before,
        "loads": 5,  # two models, dense ones of both first, then 50 %, 90 % and the rest, to and fro
        "scorings": 2 * 3,  # no method looks at data, so the tasks share them
        "downloads": {},
    }
    large = sweep.preview("plans/sparsity_7b.yaml")["price"]
    assert large["scorings"] == 2 * (3 + 1 + 1), "wanda is scored on each task"
    assert set(large["downloads"]) == {"meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"}
    base = {"model": "facebook/opt-125m", "tuning": "none"}
    plan = {"kind": "sparsity", "base": base, "axes": {"sparsity": [0, 0.5]}}
    price = sweep.preview(plan)["price"]
    assert price["trainings"] == 0 and price["evaluations"] == 2 and price["downloads"]["facebook/opt-125m"] > 2e8


def test_a_small_sweep_has_a_row_of_numbers_for_each_cell(tmp_path):
    base = {**QUICK, "tuning": "none"}
    values = {"kind": "sparsity", "base": base, "axes": {"sparsity": [0, 0.5], "importance": ["magnitude", "random"]}}
    found = sweep.run(values, tmp_path / "s")
    assert (found["done"], found["failed"], found["aliases"]) == (3, 0, 1)
    rows = sweep.results(tmp_path / "s")
    assert [row["measured_sparsity"] for row in rows] == [None, None, 0.5, 0.5]
    assert all(row["all_facts_hold"] and row["n"] == 8 and row["tuned_low"] <= row["tuned"] for row in rows)
    assert set(sparsity_columns({})) == set(sparsity_columns(read_run(rows[0]["run_dir"]).result))
    assert not shared_models._held and not mask_sets._held, "a sweep gives back what its jobs shared"


@pytest.mark.parametrize("changes", [{"model": "other"}, {"dtype": "bfloat16"}, {"seed": 1}, {"scope": "row"}])
def test_a_set_of_masks_serves_no_other_weights_precision_seed_or_scope(changes, tmp_path, monkeypatch):
    """Also where only the loaded weights can tell models apart, as with a hub model."""
    loaded = models.load_model("tiny-gpt2", device="cpu", dtype=changes.get("dtype", "float32")).model
    own = models.load_model("tiny-gpt2", device="cpu", dtype="float32").model
    if "model" in changes:
        with torch.no_grad():
            next(p for p in loaded.parameters() if p.ndim == 2).add_(1.0)
    wanted = mask_sets.Wanted("unstructured", "random", "layer", "outputs", 0)
    other = mask_sets.Wanted("unstructured", "random", changes.get("scope", "layer"), "outputs", changes.get("seed", 0))
    first = mask_sets.chosen(own, wanted, 0.5, [], folder=tmp_path)
    second = mask_sets.chosen(loaded, other, 0.5, [], folder=tmp_path)
    again = mask_sets.chosen(own, wanted, 0.2, [], folder=tmp_path)
    assert [one.came for one in (first, second, again)] == ["measured", "measured", "cached"]


@pytest.fixture
def scorings(monkeypatch):
    """What weights were scored by, each time that it was done."""
    found, own = [], importance.scores

    def counted(model, name, *rest, **more):
        found.append(name)
        return own(model, name, *rest, **more)

    monkeypatch.setattr(importance, "scores", counted)
    return found


@pytest.mark.parametrize(
    "more, times",
    [
        ({}, 1),
        ({"axes": {"calibration_rows": [4, 6]}}, 2),
        ({"axes": {"task": ["boolq", "hellaswag"]}}, 2),
        ({"base": {"pattern": "structured"}, "axes": {"dimension": ["outputs", "inputs"]}}, 2),
        ({"base": {"importance": "random"}, "axes": {"calibration_rows": [4, 6]}}, 1),
    ],
)
def test_one_scoring_serves_all_sparsities_of_a_plan_and_no_other_ranking_as_its_price_says(
    more, times, scorings, tmp_path
):
    base = {**QUICK, "tuning": "none", "limit": 2, "importance": "taylor", "calibration_rows": 4} | more.get("base", {})
    axes = {"sparsity": [0, 0.15, 0.5, 0.95]} | more.get("axes", {})
    values = {"kind": "sparsity", "base": {k: v for k, v in base.items() if k not in axes}, "axes": axes}
    found = sweep.run(values, tmp_path / "s")
    assert found["failed"] == 0 and len(scorings) == times == sweep.preview(values)["price"]["scorings"]
    rows = sweep.results(tmp_path / "s")
    assert all(row["all_facts_hold"] for row in rows)
    shas = {share: {row["mask_sha256"] for row in rows if row["sparsity"] == share} for share in axes["sparsity"]}
    assert [len(shas[share]) for share in (0.15, 0.5, 0.95)] == [times] * 3
    assert len(list((tmp_path / "s" / "runs" / mask_sets.FOLDER).glob("*"))) == times


def test_a_mask_is_the_same_one_whatever_others_are_made_with_it(tmp_path):
    model = models.load_model("tiny-gpt2").model
    wanted = mask_sets.Wanted("unstructured", "random", "layer", "outputs", 0)
    alone = mask_sets.chosen(model, wanted, 0.35, [], folder=tmp_path)
    among = mask_sets.chosen(model, wanted, 0.35, [], folder=tmp_path, others=[0, 0.15, 0.95])
    assert (alone.came, among.came) == ("measured", "measured") and alone.sha256 == among.sha256
    assert among.levels.sparsities == tuple(sorted([*mask_sets.USUAL, 0.15, 0.35, 0.95]))
    usual = mask_sets.chosen(model, wanted, 0.5, [], folder=tmp_path)
    assert usual.levels.sparsities == mask_sets.USUAL
    assert mask_sets.chosen(model, wanted, 0.2, [], folder=tmp_path, others=[0, 0.9]).came == "cached"


def test_more_sparsities_than_a_set_holds_are_made_in_as_few_sets_as_can_be():
    many = [n / 100 for n in range(1, 21)]
    found = mask_sets.in_sets("unstructured", many)
    assert [len(one) for one in found] == [15, 5] and [*found[0], *found[1]] == many
    assert mask_sets.in_sets("unstructured", [0.0, *many[:6]]) == [sorted({*many[:6], *mask_sets.USUAL})]
    assert mask_sets.in_sets("unstructured", [0.05, *many[:6], 0.99]) == [[*many[:6], 0.99]]
    assert mask_sets.in_sets("nm", [0, 0.5]) == [[0.25, 0.5, 0.75]]


def test_a_run_that_was_stopped_in_training_goes_on_under_its_mask_and_ends_as_without_the_stop(tmp_path):
    whole = run(tmp_path / "a" / "whole", steps=4, checkpoint_every=1)
    reports = []

    def stop() -> bool:
        return sum(now["stage"] == "training fine_tuned" for now in reports) >= 2

    config = SparsityConfig(**QUICK | {"steps": 4, "checkpoint_every": 1})
    with pytest.raises(Interrupted, match="stopped in step"):
        SparsityExperiment.run(config, run_dir=tmp_path / "b" / "run", progress=reports.append, should_stop=stop)
    assert read_run(tmp_path / "b" / "run").status == "interrupted"
    found = SparsityExperiment.run(config, run_dir=tmp_path / "b" / "run", resume=True)
    assert found["all_facts_hold"] and found["validation_nll"] == whole["validation_nll"]
    lines = [
        read_lines(folder / "predictions.jsonl")[0] for folder in (tmp_path / "a" / "whole", tmp_path / "b" / "run")
    ]
    assert lines[0] == lines[1]


def test_the_log_names_stages_and_validations_but_not_every_step(tmp_path):
    run(tmp_path / "run", steps=6, validations=1)
    lines = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    steps = [line.split("'step': ")[1].split(",")[0] for line in lines if "training fine_tuned" in line]
    assert steps == ["1", "6"] and any("evaluating" in line for line in lines)


@pytest.mark.slow
def test_the_plan_of_twelve_rows_killed_twice_ends_with_the_results_of_one_that_was_not(tmp_path):
    values = yaml.safe_load((ROOT / "plans" / "sparsity_12.yaml").read_text(encoding="utf-8"))
    values["base"] |= {"steps": 4, "limit": 16, "batch_size": 4, "checkpoint_every": 2}
    plan, folder = tmp_path / "plan.json", tmp_path / "killed"
    plan.write_text(json.dumps(values))
    words = [sys.executable, "-m", "nbhelpers", "sweep", "run", str(plan), "--out", str(folder)]
    for results, moment in ((1, 0.3), (4, 0.6)):  # so many results, and in the job after them
        sweeping = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 240
        while len(list(folder.glob("runs/*/result.json"))) < results:
            assert sweeping.poll() is None and time.monotonic() < until, "it did not get so far"
            time.sleep(0.02)
        time.sleep(moment)
        sweeping.kill()
        assert sweeping.wait() == -signal.SIGKILL
    assert sweep.status(folder)["missing"] > 0
    last = sweep.run(plan, folder)
    assert (last["done"], last["failed"], last["missing"], last["aliases"]) == (9, 0, 0, 3)
    done = [path.parent.name.rpartition("-")[0] for path in folder.glob("runs/*/result.json")]
    assert sorted(done) == sorted(set(done)) and len(done) == 9, "each job has one result"
    sweep.run(plan, tmp_path / "whole")
    measured = ("dense", "masked", "tuned", "tuned_low", "mask_sha256", "merge_violations", "validation_nll")
    rows = {
        name: [[row[key] for key in (*values["axes"], "alias", *measured)] for row in sweep.results(tmp_path / name)]
        for name in ("killed", "whole")
    }
    assert rows["killed"] == rows["whole"] and len(rows["whole"]) == 12
