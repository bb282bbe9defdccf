"""Do the mask commands make, check and apply masks, and leave with the exit code that belongs to what they found?"""

from __future__ import annotations

import json

import pytest
import torch
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
