"""Does masking weights, and taking MLP channels out, do what it says, cost what it says, and load elsewhere?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nbhelpers import (
    channels,
    commands_training,
    data,
    generated,
    mask_files,
    mask_sets,
    masks,
    models,
    plots,
    plots_pruning,
)
from nbhelpers import notebook as around
from nbhelpers.experiments import PruningConfig
from nbhelpers.pruning_panel import PruningTabs
from nbhelpers.runs import read_run
from nbhelpers.weight_pruning import PRESETS, WeightPruningConfig, WeightPruningExperiment, from_preset, gain

QUICK = {"model": "tiny-gpt2", "window": 32, "evaluation_windows": 4, "batch_size": 2, "sample_tokens": 2}
QUICK |= {"device": "cpu", "steps": 2, "control": False}

CHANNELS = {"what": "channels"}
FEW = r"calibration_rows must be at most the \d+ training rows there are, got 1000"


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    mask_sets.release()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    return str(path)


def run(text: str, folder: Path, **changes) -> dict:
    return WeightPruningExperiment.run(WeightPruningConfig(**QUICK | {"text": text} | changes), run_dir=folder)


def failed(result: dict) -> list[str]:
    return [fact["name"] for fact in result["facts"] if not fact["ok"]]


@pytest.fixture(scope="module")
def masked(text, tmp_path_factory) -> dict:
    return run(text, tmp_path_factory.mktemp("m") / "run", sparsity=0.7, control=True)


@pytest.fixture(scope="module")
def removed(text, tmp_path_factory) -> dict:
    return run(text, tmp_path_factory.mktemp("c") / "run", what="channels", sparsity=0.25)


def test_masking_measures_before_and_after_keeps_exactly_its_zeros_and_says_it_gained_nothing(masked):
    assert masked["all_facts_hold"], failed(masked)
    assert all(masked[stage]["tokens"] == masked["baseline"]["tokens"] for stage in ("pruned", "fine_tuned", "control"))
    weights = masks.weights(models.load_model(masked["model_dir"], device="cpu").model)
    zeros, numbers = (
        sum(map(count, weights.values())) for count in (lambda w: int((w == 0).sum()), lambda w: w.numel())
    )
    assert (masked["mask"]["masked"], masked["mask"]["numbers"]) == (zeros, numbers)
    assert zeros == sum(masks.count(0.7, weight.numel()) for weight in weights.values())
    assert masked["mask"]["coverage"] == pytest.approx(numbers / masked["parameters"])
    assert [one["gone"] for one in masked["mask"]["per_layer"]] == [int((w == 0).sum()) for w in weights.values()]
    assert masked["parameters_before"] == masked["parameters_after"] and masked["bytes_before"] == masked["bytes_after"]
    assert masked["gain"].startswith("Masks alone make nothing faster or smaller")
    assert masked["verdict"].startswith("Masking the weights took perplexity from ")


def test_removed_channels_are_gone_from_the_file_and_plain_transformers_loads_what_is_left(removed):
    assert removed["all_facts_hold"], failed(removed)
    assert {"plain_transformers_computes_the_same", "removal_changed_nothing"} <= {f["name"] for f in removed["facts"]}
    model = AutoModelForCausalLM.from_pretrained(removed["model_dir"])
    before = channels.channel_geometry(models.load_model("tiny-gpt2", device="cpu").model)
    after = channels.channel_geometry(model)
    assert after.channels == before.channels * 3 // 4 == removed["channels"]["after"]
    assert models.parameters(model) == removed["parameters_after"] < removed["parameters_before"]
    # a channel of GPT-2: its column, its bias and its row
    width = model.config.hidden_size
    gone = before.layers * (before.channels - after.channels)
    assert removed["parameters_before"] - removed["parameters_after"] == gone * (2 * width + 1)
    assert removed["bytes_before"] - removed["bytes_after"] == 4 * gone * (2 * width + 1)
    assert all(removed[f"tokens_per_second_{name}"] > 0 for name in ("before", "masks_alone", "after"))
    assert "masks alone: none" in removed["gain"]


def test_sparse_lora_after_masking_brings_its_merge_proof_and_no_steps_no_tuning(text, tmp_path):
    tuned = run(text, tmp_path / "a", method="lora", pattern="nm", importance="wanda", calibration_rows=2)
    assert tuned["all_facts_hold"] and tuned["merge"]["violations"] == 0
    assert "unmerging_gives_back_the_weights" in {fact["name"] for fact in tuned["facts"]}
    bare = run(text, tmp_path / "b", steps=0, sparsity=0)
    assert bare["all_facts_hold"] and bare["fine_tuned"] is None and bare["merge"] is None
    assert bare["pruned"] == bare["baseline"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, str]:
    """Mask files of tiny-gpt2: of one sparsity, and of two."""
    model, folder = models.load_model("tiny-gpt2", device="cpu").model, tmp_path_factory.mktemp("stored")
    for name, levels in (("one", [0.75]), ("two", [0.25, 0.75])):
        made = masks.create(model, masks.weights(model), levels, scope="layer", absolute=True)
        (folder / name).mkdir()
        mask_files.save(folder / name / "masks.pt", made, importance="magnitude")
    return {name: str(folder / name) for name in ("one", "two")}


def test_without_a_sparsity_the_only_one_of_a_mask_file_is_taken_and_told(stored, text, tmp_path):
    found = run(text, tmp_path / "run", masks=stored["one"], steps=0)
    assert found["all_facts_hold"], failed(found)
    assert found["level"] == 0.75 and found["mask"]["sparsity"] == pytest.approx(0.75, abs=1e-4)
    assert read_run(tmp_path / "run").config["sparsity"] is None


def test_a_mask_made_by_the_run_itself_is_of_half_the_weights_where_nothing_is_said():
    assert [WeightPruningConfig(**QUICK | one).sparsity for one in ({}, {"sparsity": None}, {"sparsity": 0})] == [
        0.5,
        0.5,
        0,
    ]
    assert WeightPruningConfig(masks="anything.pt").sparsity is None


@pytest.mark.parametrize(
    "name, sparsity, said",
    [
        ("two", None, "holds the sparsities 0.25, 0.75: choose one with --sparsity"),
        ("two", 0.5, "unknown sparsity 0.5.* Available: 0.25, 0.75"),
        ("one", 0.5, "unknown sparsity 0.5.* Available: 0.75"),
    ],
)
def test_a_level_that_a_mask_file_does_not_settle_is_asked_for_before_a_model_is_loaded(
    name, sparsity, said, stored, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(LookupError, match=said):
        run(text, tmp_path / "run", masks=stored[name], sparsity=sparsity)
    assert not (tmp_path / "run").exists()


def test_channels_that_removal_takes_wrong_are_reported(text, tmp_path, monkeypatch):
    own, every = channels.remove_channels, channels.channel_geometry

    def careless(model, kept):
        """As many channels stay, but the ones beside those that were chosen."""
        count = every(model).channels
        return own(model, [[[(at + 1) % count for at in one] for one in layer] for layer in kept])

    monkeypatch.setattr(channels, "remove_channels", careless)
    result = run(text, tmp_path / "run", what="channels", steps=0)
    assert failed(result) == ["removal_changed_nothing"]


def test_weights_that_are_not_masked_are_reported(text, tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "apply", lambda model, mask: None)
    result = run(text, tmp_path / "run", steps=0)
    assert set(failed(result)) == {"mask_holds_after_masking", "pruning_changed_the_logits"}


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"what": "channels", "pattern": "nm"}, ValueError, "pattern is of what 'weights'"),
        ({"what": "channels", "masks": "m.pt"}, ValueError, "masks is of what 'weights'"),
        ({"what": "channels", "sparsity": 1}, ValueError, "would take every channel"),
        ({"what": "heads"}, ValueError, "weights"),
        ({"importance": "wnada"}, LookupError, "Did you mean 'wanda'"),
        *(({"importance": "wanda", "calibration_rows": 1000} | what, ValueError, FEW) for what in ({}, CHANNELS)),
        ({"masks": "nowhere.pt"}, LookupError, "'nowhere.pt' does not exist"),
        ({"model": "tiny-gtp2"}, LookupError, "Did you mean 'tiny-gpt2'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_run_directory_exists(changes, error, said, text, tmp_path):
    with pytest.raises(error, match=said):
        run(text, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_an_importance_that_looks_at_no_data_needs_no_rows_to_score_on(text, tmp_path):
    assert run(text, tmp_path / "run", steps=0, calibration_rows=1000)["all_facts_hold"]


def test_the_gain_of_a_removal_is_that_of_a_pencil():
    went = {"parameters_before": 200, "parameters_after": 150, "bytes_before": 800, "bytes_after": 600}
    said = gain(went | {"removed": 5, "speed": "removal: 1.20 times as fast"})
    assert said.startswith("150 parameters instead of 200 (25.0% fewer), 600 bytes instead of 800; removal: 1.20 times")


def test_a_preset_fixes_the_amount_of_work_and_an_unknown_one_is_named():
    assert all({"model", "text", "steps"} <= preset.keys() for preset in PRESETS.values())
    assert from_preset("gpu", what="channels", sparsity=None).sparsity == 0.5
    with pytest.raises(LookupError, match="unknown preset 'tny'. Did you mean 'tiny'"):
        from_preset("tny")


def test_the_command_shows_what_went_and_what_that_gave(removed):
    shown = commands_training.show_weight_pruning(removed)
    assert f"{removed['went']}. {removed['gain']}" in shown and "FAILED" not in shown
    assert [line.split()[0] for line in shown.splitlines()[:4]] == ["stage", "baseline", "pruned", "fine_tuned"]


# ------------------------------------------------------------------------------------------------ pictures and tabs


def test_the_map_of_weights_shows_the_share_of_each_projection(masked):
    axes = plots_pruning.what_went(masked).axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert len(shown) == len(masked["mask"]["per_layer"]) and set(shown) == {"70%"}
    assert "weights masked" in around.what_went(masked) and "the mask reaches" in around.what_went(masked)


def test_the_gains_of_removal_stand_beside_masks_alone(removed):
    bars = [bar.get_height() for bar in plots_pruning.what_went(removed).axes[0].patches]
    assert bars[:2] == [1.0, 1.0]
    ratio = removed["parameters_after"] / removed["parameters_before"]
    assert bars[3] == pytest.approx(ratio) and bars[5] == pytest.approx(
        removed["tokens_per_second_after"] / removed["tokens_per_second_before"]
    )
    assert plots.stages(removed).axes[0].get_title() == "tiny-gpt2: channels by magnitude, level 0.25"


VALUES = {"strategy": "magnitude", "level": 0.25, "importance": "random", "sparsity": 0.75, "pattern": "nm"}


@pytest.mark.parametrize("what", ["heads", "weights"])
def test_run_now_runs_the_open_tab_with_the_values_that_belong_to_it(what, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BUNDLED_DOCUMENTS", 60)
    more = {name: value for name, value in QUICK.items() if name != "device"} | {"steps": 0}
    tabs = PruningTabs(what=what, root=tmp_path, **VALUES, **more)
    assert list(tabs.panels) == [what]
    tabs.run_now()
    recorded = read_run(tabs.result["run_dir"])
    expected = {"heads": ("strategy", "level"), "weights": ("importance", "sparsity", "pattern")}[what]
    assert {name: recorded.config[name] for name in expected} == {name: VALUES[name] for name in expected}
    assert tabs.result["all_facts_hold"] and "went" in around.stage_table(tabs.result) + "went"


def test_a_tab_is_made_when_it_is_opened_and_each_has_the_fields_of_its_own(tmp_path):
    tabs = PruningTabs(root=tmp_path, **VALUES)
    tabs.tabs.selected_index = 2
    shown = tabs.form.controls
    assert "sparsity" in shown and not {"what", "pattern", "masks", "mode", "level"} & set(shown)
    assert tabs.form.config().what == "channels" and tabs.form.config().pattern == "unstructured"
    tabs.tabs.selected_index = 0
    assert isinstance(tabs.form.config(), PruningConfig) and list(tabs.panels) == ["heads", "channels"]


@pytest.mark.parametrize(
    "values, said",
    [
        ({"what": "haeds"}, "unknown thing to prune 'haeds'. Did you mean 'heads'"),
        ({"what": "weights", "min_heads_per_layer": 1}, "unknown field of pruning weights 'min_heads_per_layer'"),
        ({"masks": "m.pt"}, "unknown field of pruning heads 'masks'"),
    ],
)
def test_a_value_that_the_open_tab_does_not_have_is_refused(values, said, tmp_path):
    with pytest.raises(LookupError, match=said):
        PruningTabs(root=tmp_path, **values)
