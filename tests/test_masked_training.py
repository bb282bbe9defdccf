"""Does fine-tuning under a mask keep its zeros in every step, go on bit for bit after a stop, and see a fault?"""

from __future__ import annotations

import json

import pytest
import small_models
import torch

from nbhelpers import (
    cerebras,
    generated,
    jobkinds,
    mask_choice,
    mask_files,
    mask_sets,
    masked_adapters,
    masks,
    models,
    records,
    sparse_lora,
)
from nbhelpers.fine_tuning import FineTuningConfig, FineTuningExperiment, verdict
from nbhelpers.fine_tuning_panel import FineTuningPanel
from nbhelpers.runs import read_run
from nbhelpers.sparsity import SparsityConfig
from nbhelpers.training import TrainingConfig, fine_tune

QUICK = {"model": "tiny-gpt2", "window": 32, "evaluation_windows": 4, "batch_size": 2, "sample_tokens": 2}
QUICK |= {"device": "cpu", "steps": 3, "samples": False, "learning_rate": 1e-3}
S2S, S2D = "sparse_to_sparse", "sparse_to_dense"


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    mask_sets.release()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    return str(path)


def config(text: str, **changes) -> FineTuningConfig:
    return FineTuningConfig(**{"data": text, **QUICK, **changes})


def failed(result: dict) -> list[str]:
    return [fact["name"] for fact in result["facts"] if not fact["ok"]]


def zeros(result: dict) -> int:
    """Counted on the saved model, without any mask."""
    model = models.load_model(result["model_dir"], device="cpu").model
    return sum(int((weight == 0).sum()) for weight in masks.weights(model).values())


@pytest.fixture(scope="module")
def sparse(text, tmp_path_factory) -> dict:
    """Sparse LoRA, the sparsity left open."""
    return FineTuningExperiment.run(config(text, method="sparse_lora"), run_dir=tmp_path_factory.mktemp("s") / "run")


# ------------------------------------------------------------------------------------------------ one training


def rows(number: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 64, (12,), generator=generator) for _ in range(number)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def half(model) -> dict:
    return masks.create(model, masks.weights(model), 0.5, scope="layer", absolute=True).mask(0.5)


def tune(folder, mode=S2S, *, model=None, mask=None, **settings):
    model = model or small_models.build("llama")
    mask = half(small_models.build("llama")) if mask is None else mask
    values = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "eval_every": 2}
    more = {name: settings.pop(name) for name in ("should_stop", "progress", "resume") if name in settings}
    return fine_tune(
        model,
        rows(10, 0),
        rows(5, 1),
        TrainingConfig(**values | settings),
        output_dir=folder,
        sparse=(mask, mode),
        **more,
    )


def test_all_weights_are_trained_and_after_every_step_the_masked_ones_are_zero(tmp_path):
    model, alive = small_models.build("llama"), []
    before = {name: weight.clone() for name, weight in masks.weights(model).items()}
    mask = half(model)
    found = tune(
        tmp_path, model=model, mask=mask, progress=lambda now: alive.append(masks.verify(model, mask)["violations"])
    )
    assert alive == [0] * 4
    seen = found.masked
    assert (seen["steps"], seen["steps_with_changes"], seen["violations"], seen["from_step"]) == (4, 4, 0, 0)
    assert seen["changed"] > 0, "momentum and weight decay had moved them in every step"
    after = masks.weights(model)
    assert all(not torch.equal(after[name][mask[name]], before[name][mask[name]]) for name in after)


def test_sparse_to_dense_is_masked_once_and_then_fills_the_zeros(tmp_path):
    model = small_models.build("llama")
    mask, first = half(model), []

    def hear(now):
        first.append(masks.verify(model, mask)["violations"])

    found = tune(tmp_path, S2D, model=model, mask=mask, progress=hear, schedule="constant", warmup_share=0.0)
    gone = sum(int((~kept).sum()) for kept in mask.values())
    assert first[0] > 0.9 * gone and found.masked["changed"] == 0
    masked = small_models.build("llama")
    masks.apply(masked, mask)
    start = fine_tune(
        masked,
        rows(10, 0),
        rows(5, 1),
        TrainingConfig(steps=1, batch_size=4, eval_every=1),
        output_dir=tmp_path / "other",
    )
    assert found.validation_nlls[0] == start.validation_nlls[0], "it begins as the masked model"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_six_steps_under_a_mask_are_bit_for_bit_three_a_stop_and_three_more(method, tmp_path):
    settings = {"steps": 6, "method": method, "checkpoint_every": 100}
    straight, again = small_models.build("llama"), small_models.build("llama")
    once, told = tune(tmp_path / "a", model=straight, **settings), []
    stopped = tune(tmp_path / "b", progress=told.append, should_stop=lambda: len(told) >= 3, **settings)
    assert (stopped.status, stopped.steps) == ("stopped", 3)
    second = tune(tmp_path / "b", model=again, resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))
    assert second.train_losses == once.train_losses and second.validation_nlls == once.validation_nlls
    if method == "full":
        assert (second.masked["from_step"], second.masked["steps"], second.masked["violations"]) == (3, 3, 0)


def test_a_checkpoint_is_not_gone_on_with_under_another_mask_or_mode(tmp_path):
    tune(tmp_path, checkpoint_every=2)
    other = {name: kept.flip(0) for name, kept in half(small_models.build("llama")).items()}
    for changes in ({"mask": other}, {"mode": S2D}):
        with pytest.raises(ValueError, match="was made with other sparse; resume with the same"):
            tune(tmp_path, checkpoint_every=2, resume=True, **changes)


def test_a_mask_on_a_model_in_four_bits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a mask is kept by methods 'lora' and 'full', got 'qlora'"):
        tune(tmp_path, method="qlora")


# ------------------------------------------------------------------------------------------------ one run


def test_sparse_lora_measures_the_masked_model_proves_its_merge_and_keeps_exactly_its_zeros(sparse):
    assert sparse["all_facts_hold"], failed(sparse)
    proofs = {"masked_weights_are_zero_after_merging", "merged_model_computes_the_same", "mask_holds_masked"}
    proofs |= {"unmerging_gives_back_the_weights", "deltas_were_masked_by_the_stored_mask", "mask_holds_fine_tuned"}
    assert proofs <= {fact["name"] for fact in sparse["facts"]}
    assert [sparse[stage]["perplexity"] > 1 for stage in ("baseline", "masked", "fine_tuned")] == [True] * 3
    assert sparse["masked"]["nll"] != sparse["baseline"]["nll"]
    assert (sparse["mask"]["sparsity"], sparse["mask"]["mode"], sparse["merge"]["violations"]) == (0.5, S2S, 0)
    assert zeros(sparse) == sparse["mask"]["masked"] == sparse["mask"]["numbers"] // 2
    assert sparse["trainable_parameters"] < sparse["parameters"]
    stages = [event["stage"] for event in read_run(sparse["run_dir"]).events if "perplexity" in event]
    assert stages == ["baseline", "masked", "fine_tuned"]


def test_the_masked_model_is_the_model_with_its_smallest_weights_zeroed_by_hand(sparse, text):
    model = models.load_model("tiny-gpt2", device="cpu").model
    from nbhelpers import evaluate

    for weight in masks.weights(model).values():
        order = weight.abs().flatten().argsort(stable=True)
        weight.view(-1)[order[: weight.numel() // 2]] = 0
    plan = FineTuningExperiment._check(config(text))
    found = evaluate.perplexity(model, plan[3]["test"][:4])
    assert found.nll == pytest.approx(sparse["masked"]["nll"], rel=1e-6)


def test_full_fine_tuning_keeps_the_zeros_or_only_begins_with_them(text, tmp_path):
    kept = FineTuningExperiment.run(config(text, sparsity=0.75), run_dir=tmp_path / "s2s")
    filled = FineTuningExperiment.run(config(text, sparsity=0.75, mode=S2D), run_dir=tmp_path / "s2d")
    assert kept["all_facts_hold"] and filled["all_facts_hold"], failed(kept) + failed(filled)
    assert "masked_weights_were_zero_after_every_step" in {fact["name"] for fact in kept["facts"]}
    assert kept["masked"] == filled["masked"] and kept["mask"]["sha256"] == filled["mask"]["sha256"]
    assert zeros(kept) == kept["mask"]["masked"] > 10 * zeros(filled)
    assert kept["merge"] is None and kept["trainable_parameters"] == kept["parameters"]


def test_a_stored_mask_does_what_the_same_mask_made_here_does(sparse, text, tmp_path):
    model = models.load_model("tiny-gpt2", device="cpu").model
    levels = masks.create(model, masks.weights(model), [0.25, 0.5], scope="layer", absolute=True)
    path = tmp_path / "masks" / "masks.safetensors"
    path.parent.mkdir()
    mask_files.save(path, levels, importance="magnitude", model_fingerprint=models.fingerprint(model))
    for place in (path, path.parent):
        settings = config(text, method="sparse_lora", masks=str(place), sparsity=0.5)
        found = FineTuningExperiment.run(settings, run_dir=tmp_path / place.suffix.strip(".") / "run")
        assert found["mask"]["sha256"] == sparse["mask"]["sha256"] and found["fine_tuned"] == sparse["fine_tuned"]
    with pytest.raises(LookupError, match="holds the sparsities 0.25, 0.5: choose one with --sparsity"):
        FineTuningExperiment.run(config(text, method="sparse_lora", masks=str(path)), run_dir=tmp_path / "which")
    wrong = config(text, model="tiny-opt", masks=str(path), sparsity=0.5)
    with pytest.raises(ValueError, match="for another model"):
        FineTuningExperiment.run(wrong, run_dir=tmp_path / "other")


@pytest.mark.parametrize("place, said", [("no", "'no' does not exist; make one"), (".", "holds 0 mask files")])
def test_a_mask_file_that_is_not_there_is_refused_with_the_way_out(place, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LookupError, match=said):
        mask_choice.file_in(place)


# ------------------------------------------------------------------------------------------------ faults


def test_zeros_that_are_not_put_back_after_a_step_are_reported(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cerebras.SparseModelWrapper, "apply_masks", lambda self: 0)
    result = FineTuningExperiment.run(config(text, sparsity=0.5), run_dir=tmp_path / "run")
    assert set(failed(result)) == {"masked_weights_were_zero_after_every_step", "mask_holds_fine_tuned"}


def test_a_callback_that_is_not_called_is_reported(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cerebras.SparseMaskCallback, "on_step_end", lambda self: 0)
    result = FineTuningExperiment.run(config(text, sparsity=0.5), run_dir=tmp_path / "run")
    assert "masked_weights_were_zero_after_every_step" in failed(result)


def test_unmerging_by_arithmetic_is_reported(text, tmp_path, monkeypatch):
    """Saboteur: (w + d) - d, as it is done elsewhere, is not w."""
    own = sparse_lora.unmerge

    def careless(model):
        merged = {name: sparse_lora.base_parameter(layer).clone() for name, layer in sparse_lora.layers(model).items()}
        count = own(model)
        for name, layer in sparse_lora.layers(model).items():
            weight = sparse_lora.base_parameter(layer)
            added = masked_adapters.delta(layer).masked_fill(~masked_adapters.kept_by(layer), 0)
            weight.data = merged[name] - added
        return count

    monkeypatch.setattr(sparse_lora, "unmerge", careless)
    result = FineTuningExperiment.run(config(text, method="sparse_lora"), run_dir=tmp_path / "run")
    assert failed(result) == ["unmerging_gives_back_the_weights"]


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"method": "lora", "sparsity": 0.5}, "a mask is for methods 'sparse_lora' and 'full', got 'lora'"),
        ({"method": "qlora", "masks": "m.pt"}, "a mask is for methods 'sparse_lora' and 'full', got 'qlora'"),
        ({"method": "sparse_lora", "sparsity": 0}, "'sparse_lora' needs a mask: sparsity must be above 0, got 0"),
        ({"sparsity": 1.5}, "less than or equal to 1"),
        ({"sparsity": 0.3, "pattern": "nm"}, "sparsity must be a multiple of 0.25, got 0.3"),
        ({"importance": "wnada"}, "unknown importance 'wnada'. Did you mean 'wanda'"),
        ({"pattern": "structured", "scope": "row"}, "unknown scope of pattern 'structured' 'row'"),
        ({"dimension": "inputs"}, "dimension is of pattern 'structured', got 'inputs' with 'unstructured'"),
        ({"mode": "dense"}, "sparse_to_dense"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused_at_birth(changes, said):
    with pytest.raises((ValueError, LookupError), match=said):
        FineTuningConfig(**changes)


@pytest.mark.parametrize("name", [*mask_choice.FIELDS, "mode"])
def test_a_field_of_a_mask_has_the_bounds_and_the_words_that_the_sweep_s_has(name):
    ours, theirs = FineTuningConfig.model_fields[name], SparsityConfig.model_fields[name]
    if name == "mode":  # a sweep also has jobs without a mask
        assert set(theirs.annotation.__args__) - set(ours.annotation.__args__) == {"dense"}
    elif name == "sparsity":
        assert ours.annotation == float | None and ours.metadata == theirs.metadata
    else:
        assert (ours.annotation, ours.metadata) == (theirs.annotation, theirs.metadata)
        assert ours.description == theirs.description and ours.default == theirs.default


def resolved(**values) -> str:
    return records.sha256_json(jobkinds._resolved_fine_tuning(FineTuningConfig(**values)))


def test_a_job_without_a_mask_is_the_job_that_it_was_before_there_were_masks():
    """The three hashes were taken from the version before."""
    before = {"full": "ac40a5b29c78f99f", "lora": "7963a7efde1f9fa4", "qlora": "9bf2b490ef64096a"}
    assert {method: resolved(method=method)[:16] for method in before} == before
    assert resolved(importance="random", mode=S2D, sparsity=0) == resolved()


def test_jobs_with_other_masks_are_other_jobs_and_what_means_the_same_is_one():
    base = resolved(method="sparse_lora")
    assert base == resolved(method="sparse_lora", sparsity=0.5)
    others = [{"sparsity": 0.6}, {"importance": "random"}, {"mode": S2D}, {"scope": "row"}, {"masks": "m.pt"}]
    assert len({base, *(resolved(method="sparse_lora", **one) for one in others)}) == 1 + len(others)
    file = {"masks": "m.pt", "method": "sparse_lora"}
    with pytest.raises(ValueError, match="masks names a mask that is there, so importance decides nothing"):
        resolved(**file, importance="random")


def test_the_verdict_of_a_masked_run_is_that_of_a_pencil():
    found = {"baseline": 10.0, "masked": 20.0, "fine_tuned": 8.0}
    said = "Masking took perplexity from 10.0 to 20.0; fine-tuning took it to 8.00 (-20.0 % of the baseline)."
    assert verdict(found, None) == said


# ------------------------------------------------------------------------------------------------ the panel


def test_the_panel_shows_the_masked_stage_and_what_merging_proved(text, tmp_path):
    panel = FineTuningPanel(root=tmp_path, data=text, more={**QUICK, "method": "sparse_lora", "importance": "random"})
    panel.run_now()
    assert panel.result["mask"]["importance"] == "random"
    assert "masked" in panel.table() and panel.seen["masked"]["perplexity"] == panel.result["masked"]["perplexity"]
    assert "taking the adapters out again gives back the weights bit for bit" in panel.facts.value
    assert list(panel.form.controls["method"].parts[0].options)[-1] == "sparse_lora"
