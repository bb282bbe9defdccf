"""Is the masked product, formed by blocks, the dense one that a pencil would write down, and so are its gradients?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nbhelpers import masked_linear as ml


@pytest.fixture(params=[7, 40, 1 << 19], ids=lambda size: f"block{size}")
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(ml, "block_numbers", lambda *_: request.param)
    return request.param


def drawn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(inputs: int, outputs: int, rank: int, transposed: bool, dtype=torch.float64) -> dict:
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    return {
        "weight": drawn(*shape, seed=1, dtype=dtype),
        "bias": drawn(outputs, seed=2, dtype=dtype),
        "down": drawn(rank, inputs, seed=3, dtype=dtype).requires_grad_(),
        "up": drawn(outputs, rank, seed=4, dtype=dtype).requires_grad_(),
        "mask": drawn(*shape, seed=5) > 0.3,
    }


def dense(x, weight, bias, down, up, mask, scaling, transposed):
    """The formula in one line of autograd, with everything kept."""
    added = scaling * (up @ down)
    whole = weight + (added.t() if transposed else added) * mask
    return F.linear(x, whole.t() if transposed else whole, bias)


def ours(x, weight, bias, down, up, mask, scaling, transposed):
    return ml.masked_linear(x, weight, bias, down, up, ml.pack(mask), scaling, transposed)


def gradients(out: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out.square().sum() + out.sin().sum(), of)


def test_eight_weights_share_a_byte_and_come_back():
    mask = torch.tensor([[True, False, True, False, False, False, False, True, True]])
    assert ml.pack(mask).tolist() == [[1 + 4 + 128, 1]]
    for shape in [(3, 1), (2, 8), (5, 17), (2, 3, 20)]:
        mask = drawn(*shape) > 0
        assert ml.pack(mask).shape == (*shape[:-1], -(-shape[-1] // 8))
        assert torch.equal(ml.unpack(ml.pack(mask), shape[-1]), mask)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("inputs, outputs, rank, batch", [(13, 9, 3, (5,)), (8, 16, 1, (2, 3)), (1, 5, 2, (2, 1, 2))])
def test_output_and_gradients_are_those_of_the_dense_formula(block, transposed, inputs, outputs, rank, batch):
    parts, x = layer(inputs, outputs, rank, transposed), drawn(*batch, inputs).requires_grad_()
    wanted, got = (
        dense(x, **parts, scaling=1.7, transposed=transposed),
        ours(x, **parts, scaling=1.7, transposed=transposed),
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        gradients(got, x, parts["down"], parts["up"]), gradients(wanted, x, parts["down"], parts["up"]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("with_weight", [True, False], ids=["whole", "delta_alone"])
def test_numerical_derivatives_agree_in_float64(monkeypatch, transposed, with_weight):
    monkeypatch.setattr(ml, "block_numbers", lambda *_: 6)
    parts, x = layer(5, 4, 2, transposed), drawn(3, 5).requires_grad_()
    weight, bias = (parts["weight"], parts["bias"].requires_grad_()) if with_weight else (None, None)
    bits = ml.pack(parts["mask"])

    def out(x, down, up):
        return ml.masked_linear(x, weight, bias, down, up, bits, 0.7, transposed)

    assert torch.autograd.gradcheck(out, (x, parts["down"], parts["up"]))


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_without_a_weight_it_is_the_delta_alone(block, transposed):
    parts, x = layer(11, 6, 2, transposed), drawn(4, 11)
    alone = ml.masked_linear(x, None, None, parts["down"], parts["up"], ml.pack(parts["mask"]), 2.0, transposed)
    parts["weight"], parts["bias"] = torch.zeros_like(parts["weight"]), None
    torch.testing.assert_close(alone, dense(x, **parts, scaling=2.0, transposed=transposed))


def test_a_bias_that_is_trained_gets_its_gradient():
    parts, x = layer(5, 4, 2, False), drawn(2, 3, 5)
    parts["bias"].requires_grad_()
    out = ours(x, **parts, scaling=1.0, transposed=False)
    wanted = gradients(dense(x, **parts, scaling=1.0, transposed=False), parts["bias"])
    torch.testing.assert_close(gradients(out, parts["bias"]), wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_float32_and_bfloat16_it_stays_near_float64(block, transposed, dtype, allowed):
    parts = layer(24, 20, 4, transposed)
    x = drawn(6, 24)
    exact = dense(x, **parts, scaling=0.5, transposed=transposed)
    exact_slopes = gradients(exact, parts["down"], parts["up"])
    near = {k: v.detach().to(torch.float32 if k in ("down", "up") else dtype) for k, v in parts.items() if k != "mask"}
    near["down"].requires_grad_(), near["up"].requires_grad_()
    got = ours(x.to(dtype), **near, mask=parts["mask"], scaling=0.5, transposed=transposed)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= allowed * exact.abs().max()
    slopes = gradients(got.double(), near["down"], near["up"])
    for one, other in zip(slopes, exact_slopes, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 10 * allowed * other.abs().max()


def test_bfloat16_computes_with_the_weight_that_merging_writes():
    parts = layer(16, 12, 2, False, torch.float32)
    weight = parts["weight"].bfloat16()
    merged = (weight.float() + 0.5 * (parts["up"] @ parts["down"]) * parts["mask"]).bfloat16()
    x = torch.eye(16, dtype=torch.bfloat16)
    got = ml.masked_linear(x, weight, None, parts["down"], parts["up"], ml.pack(parts["mask"]), 0.5)
    assert torch.equal(got.t(), merged)


def test_autocast_around_it_changes_neither_the_product_nor_the_gradients():
    parts, x = layer(16, 12, 2, False, torch.float32), drawn(4, 16, dtype=torch.float32).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ours(x, **parts, scaling=0.5, transposed=False)
            found.append((out, *gradients(out, x, parts["down"], parts["up"])))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass():
    parts, x = layer(64, 48, 2, False), drawn(3, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(x, **parts, scaling=1.0, transposed=False)
    large = [tensor for tensor in kept if tensor.numel() >= 64 * 48]
    assert [tensor.data_ptr() for tensor in large] == [parts["weight"].data_ptr()]


def test_a_masked_place_where_the_factors_overflow_still_counts_as_such():
    """inf * 0 would be NaN in the sum: it is, as it is in the dense formula; training then says non-finite."""
    parts, x = layer(4, 3, 1, False), drawn(2, 4)
    with torch.no_grad():
        parts["up"][0] = torch.inf
    assert not torch.isfinite(ours(x, **parts, scaling=1.0, transposed=False)).all()


@pytest.mark.parametrize("experts, rows, columns, rank", [(3, 5, 9, 2), (1, 4, 8, 1)])
def test_the_masked_sum_of_experts_is_the_dense_one(block, experts, rows, columns, rank):
    weight, mask = drawn(experts, rows, columns), drawn(experts, rows, columns, seed=1) > 0
    left, right = (
        drawn(experts, rows, rank, seed=2).requires_grad_(),
        drawn(experts, rank, columns, seed=3).requires_grad_(),
    )
    got, wanted = ml.masked_sum(weight, left, right, ml.pack(mask), 1.5), weight + 1.5 * (left @ right) * mask
    torch.testing.assert_close(got, wanted)
    for one, other in zip(gradients(got, left, right), gradients(wanted, left, right), strict=True):
        torch.testing.assert_close(one, other)


def test_a_block_is_a_small_share_of_a_large_weight_and_large_enough_for_a_fast_product():
    assert ml.block_numbers(1024 * 1024, "cpu") == 1 << 18
    assert ml.block_numbers(4096 * 11008, "cpu") == 4096 * 11008 // 32
    assert ml.block_numbers(1 << 30, "cpu") == 1 << 21
    assert ml.block_numbers(1 << 20, "cuda") == 1 << 24


def test_autocast_around_the_sum_of_experts_does_not_round_its_gradients():
    weight, mask = drawn(2, 6, 9, dtype=torch.float32), drawn(2, 6, 9, seed=1) > 0
    sides = [drawn(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 6, 3), (2, 3, 9))]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ml.masked_sum(weight, *sides, ml.pack(mask), 1.0)
            found.append((out, *gradients(out, *sides)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
