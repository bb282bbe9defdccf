"""Is the update the one of the paper, against dense least squares by NumPy, and are the counts exact?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import build, text_rows

from nbhelpers import layer_inputs, models, sparsegpt
from nbhelpers.projections import projections
from nbhelpers.tracking import Interrupted

ROWS = text_rows((16, 16, 16, 16, 16, 16, 16, 11))


def problem(outputs: int = 5, inputs: int = 8, tokens: int = 60, seed: int = 0):
    """Weights (outputs, inputs) and correlated inputs of unequal size (inputs, tokens), float64."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(inputs, inputs)) + 2 * np.eye(inputs)
    x = (mix @ draw.normal(size=(inputs, tokens))) * np.geomspace(0.3, 3, inputs)[draw.permutation(inputs), None]
    return draw.normal(size=(outputs, inputs)), x


def least_squares(w: np.ndarray, x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Row by row the weights on what is kept that come nearest to w @ x."""
    best = np.zeros_like(w)
    for row, kept in enumerate(keep):
        if kept.any():
            best[row, kept] = np.linalg.lstsq(x[kept].T, w[row] @ x, rcond=None)[0]
    return best


def column_by_column(w: np.ndarray, h: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The paper's step with a fresh inverse of what is left at every column: w -= w_c / [H^-1]_cc * [H^-1]_c."""
    new = w.copy()
    for at in range(w.shape[1]):
        inverse = np.linalg.inv(h[at:, at:])
        for row in np.flatnonzero(~keep[:, at]):
            new[row, at:] -= new[row, at] / inverse[0, 0] * inverse[0]
            new[row, at] = 0
    return new


def error(w, new, x) -> float:
    return float(np.square((w - new) @ x).sum())


def solved(w, x, **options):
    options = {"damping": 0.0, **options}
    new, mask = sparsegpt.update(torch.from_numpy(w), torch.from_numpy(x @ x.T), **options)
    return new.numpy(), mask.numpy()


# ------------------------------------------------------------------------------------------------------------ one layer


def test_the_score_is_what_the_error_grows_by_when_the_weight_goes_and_the_rest_of_its_row_is_solved_again():
    w, x = problem()
    found = sparsegpt.saliency(torch.from_numpy(w), torch.from_numpy(x @ x.T), damping=0.0)
    for row in range(w.shape[0]):
        for at in range(w.shape[1]):
            keep = np.ones((1, w.shape[1]), bool)
            keep[0, at] = False
            assert found[row, at].item() == pytest.approx(
                error(w[row], least_squares(w[row : row + 1], x, keep), x), rel=1e-8
            )


def test_for_uncorrelated_inputs_it_is_the_square_of_wanda():
    w, norms = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    found = sparsegpt.saliency(w, norms.square().diag(), damping=0.0)
    torch.testing.assert_close(found, (w.abs() * norms).square())


@pytest.mark.parametrize("block", [1, 3, 8, 128])
def test_where_all_that_goes_stands_to_the_left_the_update_is_the_least_squares_solution(block):
    w, x = problem()
    keep = np.ones(w.shape, bool)
    keep[:, :3] = False  # also with other numbers a row
    keep[1, 2] = True
    keep[1, :2] = False
    new, mask = solved(w, x, mask=torch.from_numpy(keep), block=block)
    np.testing.assert_allclose(new, least_squares(w, x, keep), rtol=1e-8, atol=1e-10)
    assert (mask == keep).all() and (new[~keep] == 0).all()


@pytest.mark.parametrize("block", [1, 3, 128])
def test_for_any_mask_the_update_is_the_papers_step_column_by_column(block):
    w, x = problem()
    keep = np.random.default_rng(1).random(w.shape) > 0.5
    new, _ = solved(w, x, mask=torch.from_numpy(keep), block=block)
    np.testing.assert_allclose(new, column_by_column(w, x @ x.T, keep), rtol=1e-7, atol=1e-9)
    best = least_squares(w, x, keep)
    assert error(w, best, x) <= error(w, new, x) < error(w, w * keep, x)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_damping_is_a_share_of_the_mean_diagonal(damping):
    w, x = problem()
    keep = np.random.default_rng(1).random(w.shape) > 0.5
    h = x @ x.T
    new, _ = solved(w, x, mask=torch.from_numpy(keep), damping=damping)
    expected = column_by_column(w, h + damping * h.diagonal().mean() * np.eye(len(h)), keep)
    np.testing.assert_allclose(new, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_error_is_below_that_of_magnitude_pruning(seed, sparsity):
    """As published, so with damping: without it, greedy choices among nearly dependent inputs may go wrong."""
    w, x = problem(16, 24, 200, seed)
    new, mask = solved(w, x, sparsity=sparsity, damping=sparsegpt.DAMPING)
    by_size = np.abs(w).ravel().argsort(kind="stable")
    keep = np.ones(w.size, bool)
    keep[by_size[: (~mask).sum()]] = False
    assert error(w, new, x) < error(w, w * keep.reshape(w.shape), x)
    assert error(w, least_squares(w, x, mask), x) <= error(w, new, x) < error(w, w * mask, x)


@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize("sparsity, gone", [(0, 0), (0.1, 4), (0.3, 12), (0.5, 20), (0.9, 36), (0.9875, 40), (1, 40)])
def test_counts_are_exact_whatever_the_block(block, sparsity, gone):
    # 40 weights; 0.9875 of them are 39.5, and the even neighbour is 40
    w, x = problem()
    new, mask = solved(w, x, sparsity=sparsity, block=block)
    assert (~mask).sum() == gone and (new[~mask] == 0).all() and (new[mask] != 0).all()
    if sparsity == 0:
        assert (new == w).all()


def test_equal_weights_go_by_their_place():
    new, mask = sparsegpt.update(torch.ones(2, 4), torch.eye(4), sparsity=0.5)
    assert mask.tolist() == [[False] * 4, [True] * 4] and new.tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("kept, group", [(2, 4), (1, 4), (4, 8), (0, 2), (2, 2)])
def test_n_of_each_m_inputs_are_kept_in_every_row(kept, group):
    w, x = problem()
    new, mask = solved(w, x, pattern=(kept, group), block=8)
    assert (mask.reshape(5, -1, group).sum(-1) == kept).all() and ((new != 0) == mask).all()


def test_the_first_group_of_a_pattern_is_chosen_by_the_score_of_all_inputs():
    w, x = problem()
    _, mask = solved(w, x, pattern=(3, 4))
    factor = np.linalg.cholesky(np.linalg.inv(x @ x.T)).T
    lost = w[:, :4] ** 2 / factor.diagonal()[:4] ** 2
    assert (mask[:, :4].argmin(1) == lost.argmin(1)).all()


def test_an_input_that_is_always_zero_goes_first_and_moves_nothing():
    w, x = problem()
    x[3] = 0
    w[:, 3] = 100
    assert (sparsegpt.saliency(torch.from_numpy(w), torch.from_numpy(x @ x.T))[:, 3] == 0).all()
    new, mask = solved(w, x, sparsity=0.125)  # 5 of 40
    assert (~mask).sum() == 5 and not mask[:, 3].any()
    assert (np.delete(new, 3, 1) == np.delete(w, 3, 1)).all()
    new, _ = solved(w, x, sparsity=0.0)
    assert (new == w).all(), "a weight that is kept stays, whatever it reads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_are_solved_in_float32_and_stay_half_precision(dtype):
    w, x = problem()
    weight, h = torch.from_numpy(w).to(dtype), torch.from_numpy(x @ x.T).float()
    before = weight.clone()
    new, mask = sparsegpt.update(weight, h, sparsity=0.5)
    wide, _ = sparsegpt.update(weight.float(), h, mask=mask)
    assert new.dtype == dtype and torch.equal(new, wide.to(dtype)) and torch.equal(weight, before)


def test_the_error_of_an_update_is_that_of_the_outputs():
    w, x = problem()
    new = np.round(w)
    found = sparsegpt.output_error(torch.from_numpy(w), torch.from_numpy(new), torch.from_numpy(x @ x.T))
    assert found == pytest.approx(error(w, new, x) / np.square(w @ x).sum(), rel=1e-10)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "give exactly one of sparsity, pattern and mask"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "give exactly one of sparsity, pattern and mask"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\], got 1.5"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\], got nan"),
        ({"pattern": (5, 4)}, "0 <= N <= M, got 5 of 4"),
        ({"pattern": (1, 3)}, "pattern 1:3 needs inputs that 3 divides, got 8"),
        ({"pattern": (2, 4), "block": 6}, "pattern 2:4 needs block that 4 divides, got 6"),
        ({"mask": torch.ones(5, 7, dtype=torch.bool)}, r"mask must be bool \(5, 8\), got torch.bool \(5, 7\)"),
        ({"mask": torch.ones(5, 8)}, r"mask must be bool \(5, 8\), got torch.float32"),
    ],
)
def test_nonsense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        sparsegpt.update(torch.randn(5, 8), torch.eye(8), **options)


def test_moments_of_another_shape_or_without_an_inverse_are_refused():
    with pytest.raises(ValueError, match=r"hessian \(inputs, inputs\), got \(5, 8\) and \(7, 7\)"):
        sparsegpt.update(torch.randn(5, 8), torch.eye(7), sparsity=0.5)
    with pytest.raises(FloatingPointError, match="inputs of the layer cannot be inverted; give more rows"):
        sparsegpt.update(torch.randn(5, 8), torch.ones(8, 8), sparsity=0.5, damping=0.0)
    with pytest.raises(FloatingPointError, match="inputs of w cannot be inverted"):
        sparsegpt.saliency(torch.randn(5, 8), torch.full((8, 8), float("nan")), name="w")


# -------------------------------------------------------------------------------------------------------------- a model


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mixtral", "phi3"])
def test_every_projection_loses_exactly_its_share_and_nothing_else_changes(name):
    model, whole = build(name), dict(build(name).named_parameters())
    masks = sparsegpt.prune(model, ROWS, sparsity=0.3)
    covered = projections(model).covered
    assert list(masks) == [one.name for one in covered]
    for one in covered:
        weight, mask = model.get_parameter(one.name).detach(), masks[one.name]
        assert mask.shape == weight.shape and mask.dtype == torch.bool and ((weight != 0) == mask).all()
        for part in mask if mask.ndim == 3 else [mask]:
            assert int((~part).sum()) == round(0.3 * part.numel())
    rest = {name for name in whole if name not in masks}
    assert all(torch.equal(model.get_parameter(name), whole[name]) for name in rest)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_pattern_runs_along_the_inputs_also_of_conv1d(name):
    model = build(name)
    for one, mask in sparsegpt.prune(model, ROWS, pattern=(2, 4)).items():
        along_inputs = mask.T if name == "gpt2" else mask  # Conv1D: (in, out)
        assert (along_inputs.unflatten(1, (-1, 4)).sum(-1) == 2).all(), one


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_second_moments_are_those_of_what_is_read(name):
    model, seen = build(name), []
    one = next(one for one in projections(model).covered if ".1." in one.name and "mlp" in one.name)
    hook = model.get_submodule(one.module).register_forward_hook(lambda _, given, __: seen.append(given[0][0].double()))
    with torch.no_grad():
        for row in ROWS:
            model(row["input_ids"][None])
    hook.remove()
    inputs = torch.cat(seen)
    found = sparsegpt.hessians(model, [one], ROWS, batch_size=3)[one.name]
    torch.testing.assert_close(found[0], (inputs.T @ inputs).float(), rtol=1e-4, atol=1e-3)
    assert sparsegpt.hessian_bytes(one) == found.numel() * 4


def test_a_layer_is_solved_on_what_it_reads_once_the_layers_below_are_pruned():
    model = build("llama")
    masks = sparsegpt.prune(model, ROWS, sparsity=0.5)
    again, whole = build("llama"), build("llama")
    with torch.no_grad():
        for name in masks:
            if ".2." not in name:
                again.get_parameter(name).copy_(model.get_parameter(name))
    top = [one for one in projections(again).covered if ".2." in one.name]
    assert len(top) == 7
    for one in top:
        h = sparsegpt.hessians(again, [one], ROWS)[one.name][0]
        new, mask = sparsegpt.update(again.get_parameter(one.name), h, sparsity=0.5)
        assert torch.equal(mask, masks[one.name])
        torch.testing.assert_close(model.get_parameter(one.name), new)
        dense = sparsegpt.hessians(whole, [one], ROWS)[one.name][0]
        assert not torch.allclose(dense, h, rtol=1e-2)


def test_pruning_counts_its_steps_stops_where_asked_and_refuses_before_it_reads():
    model, seen = build("llama"), []
    sparsegpt.prune(model, ROWS, sparsity=0.5, batch_size=4, progress=seen.append)
    assert seen == [{"done": at, "total": 6} for at in range(1, 7)]  # 3 layers, 2 batches
    model = build("llama")
    before = models.fingerprint(model)
    with pytest.raises(Interrupted, match="stopped after 1 of 6 steps"):
        sparsegpt.prune(model, ROWS, sparsity=0.5, batch_size=4, should_stop=lambda: True)
    for options, said in (
        ({"sparsity": 2}, r"in \[0, 1\]"),
        ({}, "exactly one"),
        ({"pattern": (2, 5)}, "inputs of mod"),
    ):
        with pytest.raises(ValueError, match=said):
            sparsegpt.prune(model, ROWS, **options)
    assert models.fingerprint(model) == before


def test_there_and_back_between_the_stored_shape_and_one_matrix_an_expert():
    for name in ("gpt2", "mixtral"):
        for one in projections(build(name)).covered:
            tensor = torch.randn(one.shape)
            parts = layer_inputs.as_experts(one, tensor)
            assert parts.shape[0] == layer_inputs.experts(one) and parts.shape[2] == layer_inputs.fan_in(one)
            assert torch.equal(layer_inputs.stored(one, parts), tensor)
