"""Do the mask commands make, check and apply masks, and leave with the exit code that belongs to what they found?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nbhelpers import cli, masks, models


def call(*arguments: object):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build(words), words)


def result(*arguments: object) -> dict:
    found = call(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three nested masks of tiny-gpt2 by magnitude."""
    folder = tmp_path_factory.mktemp("made") / "masks"
    found = result(
        *("masks", "create", "--model", "tiny-gpt2", "--scope", "layer", "--device", "cpu", "--out", folder),
        *("--sparsity", 0.5, "--sparsity", 0.1, "--sparsity", 0.9),
    )
    return folder, found


def test_masks_of_several_sparsities_are_made_with_exact_counts(made):
    _, found = made
    own = models.load_model("tiny-gpt2", device="cpu").model
    numbers = sum(weight.numel() for weight in masks.weights(own).values())
    assert [one["asked"] for one in found["levels"]] == [0.1, 0.5, 0.9] and found["layers"] == 16
    by_hand = [
        sum(masks.count(level, weight.numel()) for weight in masks.weights(own).values()) for level in (0.1, 0.5, 0.9)
    ]
    assert [one["gone"] for one in found["levels"]] == by_hand and by_hand[1] == numbers // 2


def test_a_model_is_masked_saved_and_verified_and_the_unmasked_one_is_a_violation(made, tmp_path):
    folder, created = made
    applied = result("masks", "apply", folder, "--model", "tiny-gpt2", "--sparsity", 0.5, "--out", tmp_path / "m")
    assert applied["violations"] == 0 and applied["sparsity"] == 0.5
    held = result("masks", "verify", folder, "--model", tmp_path / "m", "--sparsity", 0.5)
    assert (held["layers"], held["violations"], held["sha256"]) == (16, 0, created["sha256"])
    broken = call("masks", "verify", folder, "--model", "tiny-gpt2", "--sparsity", 0.5, "--json")
    assert broken.exit_code == 1 and "masked weights are not zero" in broken.stderr
    assert json.loads(broken.stdout)["violations"] == created["levels"][1]["gone"]


def test_one_revived_weight_is_found_with_its_layer(made, tmp_path):
    folder, _ = made
    call("masks", "apply", folder, "--model", "tiny-gpt2", "--sparsity", 0.9, "--out", tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("h.2.mlp.c_fc.weight"))
    place = (tensors[name] == 0).nonzero()[0]
    tensors[name][tuple(place)] = 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    found = call("masks", "verify", folder, "--model", tmp_path / "m", "--sparsity", 0.9)
    assert (
        found.exit_code == 1 and "h.2.mlp.c_fc.weight: 1 of" in found.stdout and "FAILED 1 violations" in found.stdout
    )


def test_a_file_alone_is_checked_and_a_flipped_bit_refused_by_name(made, tmp_path):
    folder, created = made
    whole = result("masks", "verify", folder)
    assert whole["violations"] is None and whole["sparsity"] == [one["sparsity"] for one in created["levels"]]
    content = bytearray((folder / "masks.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "masks.safetensors").write_bytes(bytes(content))
    found = call("masks", "verify", tmp_path)
    assert found.exit_code == 2 and "masks.safetensors' is refused" in found.stderr


def test_masks_fit_the_model_they_were_made_of_in_any_number_format_and_no_other_one(made, tmp_path):
    folder, _ = made
    asked = ("evaluate", "--task", "boolq", "--data", "bundled", "--limit", 2, "--device", "cpu", "--dtype", "bfloat16")
    masked = ("--masks", folder / "masks.safetensors", "--masks-sparsity", 0.5)
    assert result(*asked, "--model", "tiny-gpt2", *masked, "--out", tmp_path / "a")["all_facts_hold"]
    own = models.load_model("tiny-gpt2", device="cpu")
    with torch.no_grad():
        own.model.lm_head.weight.mul_(1.5)
    models.save_model(own.model, own.tokenizer, tmp_path / "other")
    apply = ("masks", "apply", folder, "--model", tmp_path / "other", "--sparsity", 0.5)
    refused = call(*apply, "--out", tmp_path / "b")
    assert refused.exit_code == 2 and "is for a model with other files than" in refused.stderr
    assert result(*apply, "--out", tmp_path / "c", "--any-weights")["violations"] == 0
    alone = call("evaluate", "--model", "tiny-gpt2", "--masks-sparsity", 0.5, "--out", tmp_path / "d")
    assert alone.exit_code == 2 and "masks_sparsity is one of a mask file's" in alone.stderr
    alone = call("masks", "verify", folder, "--sparsity", 0.5)
    assert alone.exit_code == 2 and "name it with --model" in alone.stderr


@pytest.fixture
def on_hub():
    """tiny-gpt2 in bfloat16 as a model of the hub, in the cache of its files; called again it has another commit."""
    folder = Path(constants.HF_HUB_CACHE) / "models--owner--tiny"

    def upload(commit: str, factor: float = 1.0) -> str:
        own = models.load_model("tiny-gpt2", device="cpu", dtype="bfloat16")
        with torch.no_grad():
            own.model.lm_head.weight.mul_(factor)
        models.save_model(own.model, own.tokenizer, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return "owner/tiny"

    yield upload
    shutil.rmtree(folder, ignore_errors=True)


def test_masks_of_a_hub_model_fit_that_commit_in_any_number_format_and_no_other_weights(on_hub, tmp_path, monkeypatch):
    name = on_hub("0123abcd" * 5)
    create = ("masks", "create", "--model", name, "--scope", "layer", "--device", "cpu", "--sparsity", 0.5)
    assert result(*create, "--out", tmp_path / "m")["came"] == "measured"
    assert result(*create, "--out", tmp_path / "m")["came"] == "cached"
    apply = ("masks", "apply", tmp_path / "m", "--model")
    assert result(*apply, name, "--out", tmp_path / "a")["violations"] == 0, "made in float32, stored in bfloat16"
    asked = ("evaluate", "--task", "boolq", "--data", "bundled", "--limit", 2, "--device", "cpu", "--dtype", "bfloat16")
    masked = ("--model", name, "--masks", tmp_path / "m")
    assert result(*asked, *masked, "--out", tmp_path / "e")["all_facts_hold"]
    on_hub("4567ef89" * 5, 1.5)
    refused = call(*apply, name, "--out", tmp_path / "b")
    assert refused.exit_code == 2 and "is for a model with other files than 'owner/tiny'" in refused.stderr
    assert "nbhelpers masks apply --any-weights" in refused.stderr and "same_weights" not in refused.stderr
    refused = call(*create, "--out", tmp_path / "m")
    assert refused.exit_code == 2 and "model owner/tiny with other files" in refused.stderr


def test_masks_of_a_model_fit_a_copy_of_its_weights_among_other_files(tmp_path):
    own = models.load_model("tiny-gpt2", device="cpu", dtype="float32")
    for folder in ("one", "copy"):
        models.save_model(own.model, own.tokenizer, tmp_path / folder)
    (tmp_path / "copy" / "README.md").write_text("a copy")
    create = ("masks", "create", "--model", tmp_path / "one", "--device", "cpu", "--sparsity", 0.5)
    result(*create, "--out", tmp_path / "m")
    apply = ("masks", "apply", tmp_path / "m", "--model", tmp_path / "copy", "--out", tmp_path / "a")
    assert result(*apply)["violations"] == 0


def test_statistics_and_overlap_say_how_masks_were_made_and_what_they_share(made, tmp_path):
    folder, _ = made
    shown = call("masks", "stats", folder).stdout
    assert "importance magnitude, pattern unstructured, scope layer" in shown and "c_fc.weight" in shown
    other = ("masks", "create", "--model", "tiny-gpt2", "--importance", "random", "--scope", "layer", "--device", "cpu")
    result(*other, "--sparsity", 0.5, "--out", tmp_path / "r", "--format", "npz")
    same = result("masks", "overlap", folder, folder, "--sparsity", 0.5)
    assert same["jaccard"] == 1
    apart = result("masks", "overlap", folder, tmp_path / "r", "--sparsity", 0.5)
    assert apart["share"] == pytest.approx(0.25, abs=0.01) and apart["by_chance"] == pytest.approx(0.25)


def test_what_cannot_be_made_is_bad_input_in_one_line(made, tmp_path):
    create = ("masks", "create", "--model", "tiny-gpt2", "--device", "cpu", "--out", tmp_path / "n", "--sparsity", 0.5)
    for more, said in (
        (("--importance", "wanda"), "looks at data: name a text or task with --data"),
        (("--importance", "wnada"), "Did you mean 'wanda'"),
        (("--pattern", "nm", "--group", 64), "64 does not divide"),
        (("--format", "pickle"), "format of a mask file"),
    ):
        found = call(*create, *more)
        assert found.exit_code == 2 and said in found.stderr, found.stderr
    assert call("masks", "verify", tmp_path / "nothing").exit_code == 2
    found = call("masks", "verify", made[0], "--model", "tiny-opt", "--sparsity", 0.5)
    assert found.exit_code == 2 and "is for another model" in found.stderr


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", refuse)


CREATE = ("masks", "create", "--model", "tiny-gpt2", "--device", "cpu", "--sparsity", 0.5)


@pytest.mark.parametrize(
    "options, said",
    [
        (("--pattern", "nm", "--dimension", "channels"), "dimension is of pattern 'structured', got 'channels' with"),
        (("--pattern", "nm", "--dimension", "outputs"), "dimension is of pattern 'structured', got 'outputs' with"),
        (("--dimension", "inputs"), "dimension is of pattern 'structured', got 'inputs' with 'unstructured'"),
        (("--group", 4), "group is of pattern 'nm', got 4 with 'unstructured'"),
        (("--pattern", "structured", "--group", 8), "group is of pattern 'nm', got 8 with 'structured'"),
        (("--data", "bundled"), "'magnitude' looks at no data: leave out --data"),
        (
            ("--importance", "random", "--rows", 3, "--window", 9),
            "'random' looks at no data: leave out --rows, --window",
        ),
        (("--seed", 0), "'magnitude' draws nothing: leave out --seed"),
        (("--importance", "wanda", "--data", "bundled", "--window", 9999), "window must be at most the model's"),
        (("--importance", "wanda", "--data", "bundled", "--rows", 10**6), "calibration rows, fewer than 1000000"),
    ],
)
def test_an_option_that_decides_nothing_or_cannot_be_is_refused_before_a_model_is_loaded(
    options, said, nothing_loads, tmp_path
):
    found = call(*CREATE, "--out", tmp_path / "m", *options)
    assert found.exit_code == 2 and said in found.stderr, found.stderr
    assert not (tmp_path / "m").exists()


def test_a_text_shorter_than_a_window_takes_the_smaller_window_that_the_message_asks_for(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("the cat sat on the mat and saw a dog run.\n" * 10)
    asked = (*CREATE, "--importance", "wanda", "--data", text, "--rows", 2, "--out", tmp_path / "m")
    short = call(*asked)
    assert short.exit_code == 2 and "less than one window of 256; give more text or a smaller --window" in short.stderr
    result(*asked, "--window", 16)
    told = result("masks", "stats", tmp_path / "m")["header"]["scored_on"]
    assert (told["window"], told["rows"], told["tokens"]) == (16, 2, 32)


def test_the_same_command_again_says_that_the_masks_are_there(made, nothing_loads):
    folder, first = made
    asked = ("masks", "create", "--model", "tiny-gpt2", "--scope", "layer", "--device", "cpu", "--out", folder)
    asked += ("--sparsity", 0.1, "--sparsity", 0.5, "--sparsity", 0.9)
    again = result(*asked)
    assert (first["came"], again["came"]) == ("measured", "cached")
    assert again | {"came": "measured"} == first
    assert "are there already" in call(*asked).stdout


@pytest.mark.parametrize(
    "changes, said",
    [
        (("--model", "tiny-opt"), "(model tiny-gpt2, asked tiny-opt)"),
        (("--sparsity", 0.3), "(sparsities 0.1, 0.5, 0.9, asked 0.1, 0.3, 0.5, 0.9)"),
        (("--importance", "random", "--seed", 3), "(importance magnitude, asked random; seed 0, asked 3)"),
        (("--scope", "global"), "(scope layer, asked global)"),
        (("--pattern", "structured", "--scope", "global"), "pattern unstructured, asked structured"),
        (("--format", "npz"), "a second file beside it"),
    ],
)
def test_masks_of_another_model_or_other_settings_are_not_written_over(changes, said, made, nothing_loads):
    folder, _ = made
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = call(*CREATE, "--sparsity", 0.1, "--sparsity", 0.9, "--scope", "layer", *changes, "--out", folder)
    assert found.exit_code == 2 and said in found.stderr, found.stderr
    assert "another --out, or --overwrite" in found.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_rows_of_the_same_text_are_other_masks_and_overwrite_leaves_one_file(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "m"
    text.write_text("the cat sat on the mat and saw a dog run.\n" * 20)
    asked = (*CREATE, "--importance", "wanda", "--data", text, "--rows", 2, "--window", 16, "--out", out)
    first = result(*asked)
    text.write_text("a dog ran and the cat sat on the red mat.\n" * 20)
    found = call(*asked)
    assert found.exit_code == 2 and "(the text itself)" in found.stderr, found.stderr
    new = result(*asked, "--overwrite", "--format", "npz")
    assert new["sha256"] != first["sha256"] and {path.name for path in out.iterdir()} == {
        "masks.npz",
        "statistics.json",
    }
    (out / "masks.npz").write_bytes(b"torn")
    torn = call(*asked, "--format", "npz")
    assert torn.exit_code == 2 and "is refused" in torn.stderr and "--overwrite" in torn.stderr
    assert result(*asked, "--format", "npz", "--overwrite")["sha256"] == new["sha256"]


def test_a_sparsity_says_what_it_is_a_share_of(tmp_path):
    asked = ("masks", "create", "--model", "tiny-gpt2", "--device", "cpu", "--sparsity", 0.25)
    channels = (*asked, "--pattern", "structured", "--dimension", "channels", "--out", tmp_path / "c")
    made = result(*channels)
    (level,) = made["levels"]
    assert made["asked_of"] == "the MLP channels of each layer" and level["sparsity"] < 0.25
    shown = call(*channels).stdout
    assert f"0.25 of the MLP channels of each layer: {level['gone']:,} weights go ({level['sparsity']:.4%} of" in shown
    assert "asked of the MLP channels of each layer" in call("masks", "stats", tmp_path / "c").stdout


def test_a_level_that_has_to_be_chosen_is_asked_for_by_its_option_before_anything_is_loaded(
    made, nothing_loads, tmp_path
):
    folder, _ = made
    several, out = "holds the sparsities 0.1, 0.5, 0.9: choose one with", tmp_path / "run"
    for option, *command in (
        ("--sparsity", "masks", "verify", folder, "--model", "tiny-gpt2"),
        ("--sparsity", "masks", "overlap", folder, folder),
        ("--sparsity", "masks", "apply", folder, "--model", "tiny-gpt2", "--out", out),
        ("--sparsity", "prune-weights", "--model", "tiny-gpt2", "--masks", folder, "--out", out),
        ("--masks-sparsity", "evaluate", "--task", "boolq", "--data", "bundled", "--masks", folder, "--out", out),
    ):
        found = call(*command)
        assert found.exit_code == 2 and f"{several} {option}\n" in found.stderr, (command, found.stderr)
    wrong = call("evaluate", "--data", "bundled", "--masks", folder, "--masks-sparsity", 0.4, "--out", out)
    assert wrong.exit_code == 2 and "unknown sparsity 0.4" in wrong.stderr
    assert not out.exists()


def test_an_evaluation_takes_the_folder_of_masks_create_and_says_that_masks_come_before_quantisation(made, tmp_path):
    folder, _ = made
    asked = ("evaluate", "--model", "tiny-gpt2", "--data", "bundled", "--limit", 1, "--device", "cpu")
    asked += ("--masks", folder, "--masks-sparsity", 0.9)
    found = result(*asked, "--out", tmp_path / "a")
    assert found["all_facts_hold"] and "mask_holds_in_the_evaluated_model" in {fact["name"] for fact in found["facts"]}
    refused = call(*asked, "--quantization", "4bit", "--out", tmp_path / "b")
    assert refused.exit_code == 2 and "another model" not in refused.stderr, refused.stderr
    assert "mask the model first (nbhelpers masks apply), then quantise" in refused.stderr
    assert not (tmp_path / "b").exists()


def test_an_evaluation_under_a_mask_is_that_of_the_masked_model_and_has_its_own_answers(made, tmp_path):
    folder, _ = made
    call("masks", "apply", folder, "--model", "tiny-gpt2", "--sparsity", 0.9, "--out", tmp_path / "m")
    asked = ("evaluate", "--task", "boolq", "--data", "bundled", "--limit", 6, "--device", "cpu", "--dtype", "float32")
    with_file = result(
        *asked, "--model", "tiny-gpt2", "--masks", folder / "masks.safetensors", "--masks-sparsity", 0.9,
        *("--out", tmp_path / "s" / "a"),
    )  # fmt: skip
    saved = result(*asked, "--model", tmp_path / "m", "--out", tmp_path / "s" / "b")
    plain = result(*asked, "--model", "tiny-gpt2", "--out", tmp_path / "s" / "c")
    assert [one["protocol"]["came"] for one in (with_file, saved, plain)] == ["measured"] * 3
    lines = [
        [json.loads(line)["loglikelihoods"] for line in (tmp_path / "s" / name / "predictions.jsonl").open()]
        for name in "abc"
    ]
    assert torch.tensor(lines[0]).allclose(torch.tensor(lines[1]), atol=1e-5) and lines[0] != lines[2]
    assert "mask_holds_in_the_evaluated_model" in {fact["name"] for fact in with_file["facts"]}
