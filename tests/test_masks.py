"""Do exactly as many weights go as asked, the right ones, nested, the same for every number format?"""

from __future__ import annotations

import importlib.util
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from torch import nn
from torch.nn.utils import prune

from nbhelpers import channels, mask_patterns, mask_selection, masks, models
from nbhelpers.projections import projections

LEVELS = [round(0.1 * step, 1) for step in range(10)]


def random_scores(model, seed: int = 0, dtype=torch.float32, signed: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = torch.randn if signed else torch.rand
    return {one.name: make(one.shape, generator=generator).to(dtype) for one in projections(model).covered}


def gone_by_sorting(scores: dict[str, torch.Tensor], sparsity: str) -> dict[str, torch.Tensor]:
    """All weights in one row, sorted by score, then by place (numpy's lexsort); the first ones go."""
    flat = np.concatenate([one.float().numpy().ravel() for one in scores.values()]).astype(np.float64)
    order = np.lexsort((np.arange(len(flat)), flat))
    kept = np.ones(len(flat), bool)
    kept[order[: int((Decimal(sparsity) * len(flat)).to_integral_value())]] = False  # ROUND_HALF_EVEN
    parts = np.split(kept, np.cumsum([one.numel() for one in scores.values()])[:-1])
    return {name: torch.from_numpy(part).view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def share(mask) -> int:
    return sum(int((~kept).sum()) for kept in mask.values())


@pytest.fixture
def llama():
    return small_models.build("llama")


# How many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sparsity, numbers, goes",
    [
        (0.5, 5, 2),  # 2.5: a half to the even number
        (0.5, 7, 4),  # 3.5
        (0.5, 1, 0),
        (0.25, 2, 0),
        (0.75, 2, 2),
        (0.9, 10, 9),
        (0.7, 10, 7),  # 0.7 * 10 is 7.000000000000001 for some orders of rounding
        (0.3, 5, 2),  # 1.5
        (0.1, 5, 0),  # 0.5; the double 0.1 is above a tenth, and would round it to 1
        (0.1, 15, 2),  # 1.5; doubles and tenths agree
        (0.9, 5, 4),  # 4.5; the double 0.9 is above nine tenths, and would round it to 5
        (np.float32(0.9), 5, 4),
        (Fraction(1, 3), 9, 3),
        ("0.35", 10, 4),  # 3.5
        (0, 8, 0),
        (1, 8, 8),
        (0.0, 0, 0),
        (0.5, 10**12 + 1, 5 * 10**11),
    ],
)
def test_the_count_is_the_exact_decimal_fraction_a_half_to_the_even_number(sparsity, numbers, goes):
    assert masks.count(sparsity, numbers) == goes


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan"), "much", float("inf")])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity must be .*in \\[0, 1\\], got"):
        masks.count(sparsity, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_are_exact_at_every_level_for_every_number_format(llama, dtype):
    found = masks.create(llama, random_scores(llama, dtype=dtype), [*LEVELS, 1.0])
    numbers = projections(llama).numbers
    assert found.numbers == numbers
    assert [share(found.mask(level)) for level in [*LEVELS, 1.0]] == [
        round(Fraction(i, 10) * numbers) for i in range(11)
    ]


def test_a_bf16_matrix_full_of_ties_does_not_lose_one_weight_too_many():
    weight = {"w": torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()}
    values = weight["w"].abs().float().flatten()
    naive = int((values <= values.kthvalue(512 * 512 // 2).values).sum())
    assert naive > 512 * 512 // 2, "`score <= kth value` overshoots here"
    assert share(masks.levels(weight, 0.5, absolute=True).mask()) == 512 * 512 // 2


# Which ones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [False, True])
def test_the_lowest_scores_go_and_of_equal_ones_the_first_as_numpy_sorts_them(llama, dtype, signed):
    scores = random_scores(llama, 1, dtype, signed)
    found = masks.create(llama, scores, LEVELS)
    for level in LEVELS:
        assert same(found.mask(level), gone_by_sorting(scores, str(level))), level


@pytest.mark.parametrize("kind", ["few values", "constant", "zeros of both signs", "half zero"])
def test_ties_of_any_number_are_broken_by_layer_then_place(kind):
    draw = torch.Generator().manual_seed(2)
    make = {
        "few values": lambda n: torch.randint(-3, 4, (n,), generator=draw) / 4,
        "constant": lambda n: torch.full((n,), 0.3),
        "zeros of both signs": lambda n: torch.randint(0, 2, (n,), generator=draw) * 0.0 * (-1.0) ** torch.arange(n),
        "half zero": lambda n: torch.rand(n, generator=draw) * torch.randint(0, 2, (n,), generator=draw),
    }[kind]
    scores = {"b": make(1001), "a": make(77), "c": make(640)}  # named against the alphabet: the order given counts
    found = masks.levels(scores, LEVELS)
    for level in LEVELS:
        assert same(found.mask(level), gone_by_sorting(scores, str(level))), level


def test_pieces_and_threads_decide_nothing(llama, monkeypatch):
    scores = {name: (one * 20).round() for name, one in random_scores(llama, 3).items()}
    whole = masks.create(llama, scores, LEVELS)
    monkeypatch.setattr(mask_selection, "CHUNK", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = masks.create(llama, scores, LEVELS)
    assert all(torch.equal(whole.packed[name], again.packed[name]) for name in whole.packed)


def test_equal_scores_give_equal_masks_whatever_holds_them(llama):
    narrow = random_scores(llama, 4, torch.bfloat16)
    wide = {name: one.float() for name, one in narrow.items()}
    mixed = {name: one.float() if at % 2 else one for at, (name, one) in enumerate(narrow.items())}
    found = [masks.create(llama, scores, LEVELS).packed for scores in (narrow, wide, mixed, lambda: wide.items())]
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_magnitude_straight_from_the_weights_is_that_of_absolute_scores(llama):
    weights = masks.weights(llama)
    straight = masks.create(llama, weights, LEVELS, absolute=True)
    scored = masks.create(llama, {name: one.abs() for name, one in weights.items()}, LEVELS)
    assert all(torch.equal(straight.packed[name], scored.packed[name]) for name in weights)
    assert all(weights[name].data_ptr() == llama.get_parameter(name).data_ptr() for name in weights), "no copy"


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"scope": "row"}, {"pattern": "structured"}])
def test_levels_are_nested(llama, options):
    found = masks.create(llama, random_scores(llama, 5), LEVELS, **options)
    for low, high in pairwise(LEVELS):
        less, more = found.mask(low), found.mask(high)
        assert all(not (more[name] & ~less[name]).any() for name in more)
        assert share(less) < share(more)


def test_each_level_alone_is_the_same_mask_as_among_ten(llama):
    scores = random_scores(llama, 6)
    together = masks.create(llama, scores, LEVELS)
    assert same(masks.create(llama, scores, 0.3).mask(), together.mask(0.3))


# Oracles --------------------------------------------------------------------------------------------------------------


def distinct(numbers: int, seed: int) -> torch.Tensor:
    """Different positive numbers in random order: no ties."""
    return (torch.randperm(numbers, generator=torch.Generator().manual_seed(seed)) + 1) / numbers


def as_model(*shapes: tuple[int, int]) -> tuple[nn.Module, list[tuple[nn.Module, str]]]:
    layers = nn.ModuleList([nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes])
    values = distinct(sum(a * b for a, b in shapes), 7).split([a * b for a, b in shapes])
    with torch.no_grad():
        for layer, value in zip(layers, values, strict=True):
            layer.weight.copy_(value.view_as(layer.weight) * torch.where(torch.rand_like(layer.weight) < 0.5, -1, 1))
    return layers, [(layer, "weight") for layer in layers]


@pytest.mark.parametrize("level", [0.1, 0.25, 0.5, 0.9])
def test_global_magnitude_is_that_of_torch(level):
    model, places = as_model((24, 16), (8, 40), (31, 7))
    mine = masks.levels({str(at): layer.weight for at, layer in enumerate(model)}, level, absolute=True).mask()
    prune.global_unstructured(places, prune.L1Unstructured, amount=masks.count(level, 24 * 16 + 320 + 217))
    assert all(torch.equal(mine[str(at)], layer.weight_mask.bool()) for at, layer in enumerate(model))


def test_global_importance_scores_are_those_of_torch():
    model, places = as_model((24, 16), (8, 40))
    scores = [distinct(layer.weight.numel(), 20 + at).view_as(layer.weight) + at for at, layer in enumerate(model)]
    mine = masks.levels({str(at): one for at, one in enumerate(scores)}, 0.6).mask()
    given = dict(zip(places, scores, strict=True))
    prune.global_unstructured(places, prune.L1Unstructured, importance_scores=given, amount=masks.count(0.6, 704))
    assert all(torch.equal(mine[str(at)], layer.weight_mask.bool()) for at, layer in enumerate(model))


def test_layerwise_magnitude_is_that_of_torch():
    model, _ = as_model((24, 16), (8, 40))
    mine = masks.levels({str(at): layer.weight for at, layer in enumerate(model)}, 0.3, "layer", absolute=True).mask()
    for at, layer in enumerate(model):
        prune.l1_unstructured(layer, "weight", amount=masks.count(0.3, layer.weight.numel()))
        assert torch.equal(mine[str(at)], layer.weight_mask.bool())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dimension", ["outputs", "inputs"])
def test_rows_and_columns_are_those_of_torch_also_where_weights_lie_the_other_way(name, dimension):
    model = small_models.build(name)
    found = masks.create(
        model, masks.weights(model), 0.25, pattern="structured", dimension=dimension, absolute=True
    ).mask()
    for one in projections(model).covered:
        along = one.outputs if dimension == "outputs" else one.inputs
        holder = nn.Module()
        holder.weight = nn.Parameter(model.get_parameter(one.name).detach().clone())
        prune.ln_structured(holder, "weight", amount=masks.count(0.25, one.shape[along]), n=1, dim=along)
        assert torch.equal(found[one.name], holder.weight_mask.bool()), one.name


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_a_row_loses_its_share_of_each_outputs_inputs(name):
    model = small_models.build(name)
    scores = {key: (one * 8).round() for key, one in random_scores(model, 8).items()}  # with ties
    found = masks.create(model, scores, [0.3, 0.5], scope="row")
    for one in projections(model).covered:
        rows = one.as_matrix(scores[one.name]).flatten(0, -2)
        for level in (0.3, 0.5):
            kept = one.as_matrix(found.kept(one.name, level)).flatten(0, -2)
            for row, mine in zip(rows.numpy(), kept.numpy(), strict=True):
                gone = np.lexsort((np.arange(len(row)), row))[: masks.count(level, len(row))]
                assert set(np.flatnonzero(~mine)) == set(gone)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_two_of_four_keeps_the_two_highest_of_every_four_inputs(name):
    model = small_models.build(name)
    scores = random_scores(model, 9)
    found = masks.create(model, scores, [0.25, 0.5, 0.75], pattern="nm")
    for one in projections(model).covered:
        fours = one.as_matrix(scores[one.name]).reshape(-1, 4)
        for level, keep in ((0.25, 3), (0.5, 2), (0.75, 1)):
            kept = one.as_matrix(found.kept(one.name, level)).reshape(-1, 4)
            assert (kept.sum(1) == keep).all()
            assert torch.equal(kept, fours >= fours.topk(keep).values[:, -1:])


def test_equal_scores_among_four_go_in_their_order(llama):
    scores = {name: torch.ones_like(one) for name, one in random_scores(llama).items()}
    kept = masks.create(llama, scores, 0.5, pattern="nm").mask()
    assert all((one.reshape(-1, 4) == torch.tensor([False, False, True, True])).all() for one in kept.values())


def test_a_group_that_does_not_divide_the_inputs_is_refused(llama):
    with pytest.raises(ValueError, match="has 32 inputs, and 5 does not divide"):
        masks.create(llama, random_scores(llama), 0.2, pattern="nm", group=5)


@pytest.mark.parametrize("sparsity, group", [(0.3, 4), (0.5, 1)])
def test_a_sparsity_that_keeps_no_whole_number_is_refused(llama, sparsity, group):
    with pytest.raises(ValueError, match=f"keeps a whole number of each {group} weights"):
        masks.create(llama, random_scores(llama), sparsity, pattern="nm", group=group)


# Channels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in small_models.NAMES if name != "mistral_window"])
def test_channels_are_those_that_removal_would_choose_and_close_to_nothing(name):
    model = small_models.build(name)
    scores = random_scores(model, 10)
    mask = masks.create(model, scores, 0.5, pattern="structured", dimension="channels").mask()
    kept = channels.choose_channels(channels.channel_scores(model, scores.items()), 0.5, multiple_of=1)
    masks.apply(model, mask)
    geo = channels.channel_geometry(model)
    assert channels.closed_channels(model) == channels.others(kept, geo.channels)
    ids = small_models.ids()
    with torch.no_grad():
        masked, removed = model(ids).logits, channels.remove_channels(model, kept)(ids).logits
    assert (masked - removed).abs().max() <= 1e-5 * masked.abs().max()


def test_channels_couple_every_matrix_of_the_mlp_and_touch_no_attention():
    model = small_models.build("llama")
    mask = masks.create(model, random_scores(model), 0.5, pattern="structured", dimension="channels").mask()
    for name, kept in mask.items():
        if "self_attn" in name:
            assert kept.all()
    up, gate, down = (mask[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("up", "gate", "down"))
    assert torch.equal(up, gate) and torch.equal(up[:, 0], down[0]) and (up == up[:, :1]).all()
    assert int((~up[:, 0]).sum()) == 24


def test_fused_gates_go_with_their_ups():
    model = small_models.build("phi3")
    mask = masks.create(model, random_scores(model), 0.5, pattern="structured", dimension="channels").mask()
    fused = mask["model.layers.0.mlp.gate_up_proj.weight"][:, 0]
    assert torch.equal(fused[:48], fused[48:]) and not fused.all()


def test_groups_of_the_whole_model_are_compared_by_the_sums_of_their_scores(llama):
    scores = {name: torch.ones_like(one) for name, one in random_scores(llama).items()}
    found = masks.create(llama, scores, 0.1, pattern="structured", scope="global").mask()
    rows = {one.name: one.shape for one in projections(llama).covered}
    short = [name for name in rows if rows[name][1] == 32]  # a row of 32 ones is less than one of 48
    gone = sum(int((~found[name][:, 0]).sum()) for name in rows)
    assert gone == masks.count(0.1, sum(shape[0] for shape in rows.values()))
    assert all(found[name].all() for name in rows if name not in short)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"scope": "row"}, {"pattern": "structured"}, {"pattern": "nm"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_scores_is_an_error_that_names_the_projection(llama, options, dtype):
    for sign in (1, -1):
        scores = random_scores(llama, dtype=dtype)
        name = list(scores)[3]
        scores[name][1, 2] = sign * float("nan")
        with pytest.raises(ValueError, match=f"scores of {name} hold NaN for 1 of"):
            masks.create(llama, scores, 0.5, **options)


def test_infinite_scores_are_kept_or_go_first(llama):
    scores = random_scores(llama)
    first, *_, last = scores
    scores[first][0, 0], scores[last][0, 0] = float("inf"), -float("inf")
    found = masks.create(llama, scores, [0.01, 0.99])
    assert found.kept(first, 0.99)[0, 0] and not found.kept(last, 0.01)[0, 0]


def test_double_precision_scores_are_refused(llama):
    scores = {name: one.double() for name, one in random_scores(llama).items()}
    with pytest.raises(ValueError, match="must be float32, bfloat16, float16, got float64"):
        masks.create(llama, scores, 0.5)


def test_scores_that_are_read_once_are_refused_where_they_are_read_three_times(llama):
    with pytest.raises(ValueError, match="reads the scores three times and these can be read once"):
        masks.create(llama, iter(random_scores(llama).items()), 0.5)
    once = masks.create(llama, iter(random_scores(llama).items()), 0.5, scope="layer")
    assert same(once.mask(), masks.create(llama, random_scores(llama), 0.5, scope="layer").mask())


def test_scores_with_other_names_shapes_or_order_are_refused(llama):
    scores = random_scores(llama)
    first, second, *_ = scores
    with pytest.raises(ValueError, match=f"it lacks {first}"):
        masks.create(llama, {name: scores[name] for name in scores if name != first}, 0.5)
    with pytest.raises(ValueError, match="it has unknown lm_head.weight"):
        masks.create(llama, scores | {"lm_head.weight": torch.ones(64, 32)}, 0.5)
    with pytest.raises(ValueError, match=f"scores of {first} have shape \\(32,\\), its weights \\(32, 32\\)"):
        masks.create(llama, scores | {first: torch.ones(32)}, 0.5)
    with pytest.raises(ValueError, match=f"scores of {second} came where {first} was due"):
        masks.create(llama, list(scores.items())[1:], 0.5)
    with pytest.raises(ValueError, match=f"scores of {list(scores)[-1]} are missing"):
        masks.create(llama, list(scores.items())[:-1], 0.5)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"pattern": "unstructred"}, "unknown pattern 'unstructred'. Did you mean 'unstructured'"),
        ({"scope": "model"}, "unknown scope of pattern 'unstructured' 'model'"),
        ({"pattern": "structured", "scope": "row"}, "unknown scope of pattern 'structured' 'row'"),
        ({"pattern": "structured", "dimension": "heads"}, "unknown dimension 'heads'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(llama, options, said):
    with pytest.raises(LookupError, match=said):
        masks.create(llama, random_scores(llama), 0.5, **options)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dimension": "inputs"}, "dimension is of pattern 'structured', got 'inputs' with 'unstructured'"),
        ({"pattern": "nm", "dimension": "outputs"}, "dimension is of pattern 'structured', got 'outputs' with 'nm'"),
        ({"pattern": "structured", "group": 4}, "group is of pattern 'nm', got 4 with 'structured'"),
    ],
)
def test_an_option_that_decides_nothing_is_refused(llama, options, said):
    with pytest.raises(ValueError, match=said):
        masks.create(llama, random_scores(llama), 0.5, **options)


def test_every_pattern_has_scopes_and_exact_counts(llama):
    assert set(mask_patterns.SCOPES) == set(mask_patterns.PATTERNS)
    for pattern, scopes in mask_patterns.SCOPES.items():
        for scope in scopes:
            found = masks.create(llama, random_scores(llama), [0.25, 0.5], pattern=pattern, scope=scope)
            assert found.how["pattern"] == pattern and found.how["scope"] == scope
            if (pattern, scope) != ("structured", "global"):  # groups of different sizes
                assert share(found.mask(0.5)) == found.numbers // 2


@pytest.mark.parametrize("sparsities", [[], [at / 16 for at in range(16)]])
def test_as_many_levels_as_four_bits_tell_apart(llama, sparsities):
    with pytest.raises(ValueError, match="between 1 and 15 sparsities"):
        masks.create(llama, random_scores(llama), sparsities)


# Packed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("bits", [1, 4])
def test_codes_come_back_as_they_were_packed(numbers, bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, numbers, dtype=np.uint8)
    packed = mask_selection.pack(codes, bits)
    assert len(packed) == mask_selection.packed_bytes(numbers, bits)
    assert np.array_equal(mask_selection.unpack(packed, numbers, bits), codes)


def test_the_first_weight_is_in_the_lowest_bits():
    assert mask_selection.pack(np.array([1, 0, 0, 1, 0, 0, 0, 0, 1], np.uint8), 1).tolist() == [0b1001, 1]
    assert mask_selection.pack(np.array([3, 10, 7], np.uint8), 4).tolist() == [0xA3, 7]


def test_ten_levels_take_four_bits_a_weight_and_one_takes_one(llama):
    scores = random_scores(llama)
    numbers = projections(llama).numbers
    for levels, bits in ((LEVELS, 4), ([0.5], 1)):
        found = masks.create(llama, scores, levels)
        assert found.bits == bits and sum(one.numel() for one in found.packed.values()) == numbers * bits // 8


def test_a_level_that_is_not_there_is_named(llama):
    found = masks.create(llama, random_scores(llama), [0.1, 0.5])
    with pytest.raises(LookupError, match=r"unknown sparsity 0.4. .*Available: 0.1, 0.5"):
        found.mask(0.4)
    with pytest.raises(LookupError, match=r"of several sparsities, 0.1, 0.5: choose one \(--sparsity\)"):
        found.lazily()


def test_a_mask_by_hand_is_packed_whole():
    mask = {"w": torch.tensor([[True, False, True], [False, False, True]])}
    found = masks.pack(mask, {"pattern": "by hand"})
    assert same(found.mask(), mask) and found.sparsities == (0.5,) and found.how == {"pattern": "by hand"}


# On the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@pytest.mark.parametrize("lazy", [False, True])
def test_applied_masks_leave_exactly_what_is_kept(name, lazy):
    model = small_models.build(name)
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    levels = masks.create(model, masks.weights(model), [0.3, 0.5], absolute=True)
    masks.apply(model, levels.lazily(0.5) if lazy else levels.mask(0.5))
    mask = levels.mask(0.5)
    for key, one in model.named_parameters():
        assert torch.equal(one, before[key] * mask[key] if key in mask else before[key])
    found = masks.verify(model, levels.lazily(0.5))
    assert found["ok"] and found["layers"] == len(mask) and found["numbers"] == levels.numbers
    assert found["sparsity"] == found["masked"] / found["numbers"] == pytest.approx(0.5, abs=1e-6)
    assert same(masks.read_off(model).mask(), mask), "no weight of these models is 0 by itself"
    assert masks.read_off(model).how == {"pattern": "zeros of a checkpoint"}


def test_a_weight_that_came_back_is_a_violation_of_its_layer_also_where_it_is_nan(llama):
    mask = masks.create(llama, masks.weights(llama), 0.5, absolute=True).mask()
    masks.apply(llama, mask)
    name = "model.layers.1.mlp.up_proj.weight"
    places = (~mask[name]).nonzero()
    with torch.no_grad():
        llama.get_parameter(name)[tuple(places[0])] = 1e-30
        llama.get_parameter(name)[tuple(places[-1])] = float("nan")
    found = masks.verify(llama, mask)
    assert (found["ok"], found["violations"]) == (False, 2)
    assert {key: one["violations"] for key, one in found["per_layer"].items() if one["violations"]} == {name: 2}


def test_nan_and_infinity_become_zero_where_they_go(llama):
    mask = masks.create(llama, masks.weights(llama), 0.5, absolute=True).mask()
    name = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        llama.get_parameter(name).fill_(float("nan"))
    masks.apply(llama, mask)
    assert masks.verify(llama, mask)["ok"]


def test_a_mask_of_no_layers_proves_nothing(llama):
    with pytest.raises(ValueError, match="no layer was checked"):
        masks.verify(llama, {})
    with pytest.raises(ValueError, match="no layer was checked"):
        masks.apply(llama, {})


def test_a_mask_that_does_not_fit_by_exact_name_and_shape_touches_nothing(llama):
    mask = masks.create(llama, masks.weights(llama), 0.5, absolute=True).mask()
    before = {key: one.detach().clone() for key, one in llama.named_parameters()}
    name = list(mask)[-1]
    wrong = {
        "it lacks": {key: kept for key, kept in mask.items() if key != name},
        "it has unknown module.": {f"module.{key}": kept for key, kept in mask.items()},
        "it has unknown": mask | {"model.norm.weight": torch.ones(32, dtype=torch.bool)},
        "has shape": mask | {name: mask[name].T},
        "must be bool": mask | {name: mask[name].float()},
    }
    for said, given in wrong.items():
        for function in (masks.apply, masks.verify):
            with pytest.raises(ValueError, match=said):
                function(llama, given)
    assert all(torch.equal(one, before[key]) for key, one in llama.named_parameters())


def test_a_model_on_the_meta_device_is_enough_to_make_masks(llama):
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    scores = random_scores(llama)
    for options in ({}, {"scope": "row"}, {"pattern": "structured", "dimension": "channels"}):
        assert same(
            masks.create(empty, scores, 0.5, **options).mask(), masks.create(llama, scores, 0.5, **options).mask()
        )


@pytest.mark.data
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_real_model_every_level_is_exact_and_verified(data_dir, dtype):
    model = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype=dtype).model
    levels = masks.create(
        model, {name: one.clone() for name, one in masks.weights(model).items()}, LEVELS, absolute=True
    )
    for level in LEVELS:
        masks.apply(model, levels.lazily(level))
        found = masks.verify(model, levels.lazily(level))
        assert found["ok"] and found["masked"] == masks.count(level, projections(model).numbers)


# The benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "masks.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_masks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sides_of_the_benchmark_make_the_same_masks(benchmark):
    weights = benchmark.weights_of(benchmark.TINY)
    assert benchmark.differences(weights, benchmark.Pruned(weights)) == {"weights": 0, "beside_ties": 0}
    mine, numbers = benchmark.ours(weights, benchmark.LEVELS), benchmark.numbers_of(benchmark.TINY)
    for together in (False, True):
        for level, packed in zip(
            benchmark.LEVELS, benchmark.partition(weights, benchmark.LEVELS, together), strict=True
        ):
            kept = np.concatenate([mine.kept(name, level).numpy().ravel() for name in weights])
            assert np.array_equal(np.unpackbits(packed, count=numbers).astype(bool), kept)
    rows, theirs = benchmark.by_rows(weights, 0.5), benchmark.wanda(weights, 0.5)
    for (name, weight), gone in zip(weights.items(), theirs, strict=True):
        kept = mask_selection.unpack(rows[name].numpy(), weight.numel(), 1).reshape(weight.shape)
        assert np.array_equal(kept == 0, gone.T.numpy())


def test_the_benchmark_takes_ratios_in_each_round_and_says_what_was_not_kept(benchmark):
    times = {name: [[1.0, 1.0], [2.0, 2.0]] for name in benchmark.SIDES}
    times |= {benchmark.PRUNE: [[90.0, 300.0], [240.0, 300.0]], benchmark.READ: [[0.1, 0.1], [0.1, 0.1]]}
    machine = dict.fromkeys(("processor", "threads", "torch", "numpy"), "x")
    found = benchmark.summarise(
        {
            "speed": {
                "model": "a shape",
                "projections": 1,
                "numbers": 10,
                "rounds": times,
                "one_level": {name: [[1.0, 1.0]] for name in benchmark.SINGLE},
                "differences": {"weights": 0, "beside_ties": 0},
            },
            "memory": {name: [{"grown": 1, "weights": 8}] for name in benchmark.SIDES if name != benchmark.READ},
            "growth": [{"numbers": 100, "seconds": [1.0, 1.0], "reading": [1.0, 1.0], "grown": 1, "packed": 50}],
            "not_measured": {},
            "not_compared": {"another": "it is not there"},
            "machine": machine,
        }
    )
    assert found["speed"]["beside"][benchmark.PRUNE]["wall"] == {"median": 105.0, "low": 90.0, "high": 120.0}
    assert [one["met"] for one in found["targets"]] == [True, True, False]
    text = benchmark.markdown(found)
    assert text.count(": met.") == 2 and text.count("NOT met.") == 1
    assert "Not compared: another (it is not there)." in text
