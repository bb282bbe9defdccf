"""Are counts, overlaps and predictions those of a pencil?"""

from __future__ import annotations

import pytest
import small_models
import torch

from nbhelpers import mask_statistics, masks

ONE = {"a": torch.tensor([[True, True], [False, False]]), "b": torch.tensor([True, True, True, False])}
OTHER = {"a": torch.tensor([[True, False], [True, False]]), "b": torch.tensor([False, False, True, False])}


def test_counts_name_their_denominator():
    found = mask_statistics.counts(ONE)
    assert (found["layers"], found["numbers"], found["gone"], found["sparsity"]) == (2, 8, 3, 3 / 8)
    assert found["denominator"] == "8 weights of 2 projections"
    assert found["per_layer"] == {
        "a": {"numbers": 4, "gone": 2, "sparsity": 0.5},
        "b": {"numbers": 4, "gone": 1, "sparsity": 0.25},
    }


def test_counts_of_packed_levels_are_those_of_their_masks():
    model = small_models.build("gpt2")
    levels = masks.create(model, masks.weights(model), [0.0, 0.3, 0.5, 1.0], absolute=True)
    for found in mask_statistics.counts_of_levels(levels):
        assert found == {"asked": found["asked"], **mask_statistics.counts(levels.mask(found["asked"]))}


def test_intersection_and_union_keep_what_both_or_one_keeps():
    both, either = mask_statistics.intersection(ONE, OTHER), mask_statistics.union(ONE, OTHER)
    assert both["a"].tolist() == [[True, False], [False, False]] and both["b"].tolist() == [False, False, True, False]
    assert either["a"].tolist() == [[True, True], [True, False]] and either["b"].tolist() == [True, True, True, False]


def test_overlap_is_that_of_a_pencil_and_not_a_mean_over_layers():
    found = mask_statistics.overlap(ONE, OTHER)
    assert (found["kept"], found["both"], found["either"]) == ([5, 3], 2, 6)
    assert (found["jaccard"], found["share"], found["by_chance"]) == (2 / 6, 2 / 8, 15 / 64)
    assert found["per_layer"]["a"]["jaccard"] == 1 / 3 and found["per_layer"]["b"]["jaccard"] == 1 / 3


def test_a_mask_overlaps_with_itself_wholly_also_where_it_keeps_nothing():
    assert mask_statistics.overlap(ONE, ONE)["jaccard"] == 1.0
    nothing = {"a": torch.zeros(3, dtype=torch.bool)}
    found = mask_statistics.overlap(nothing, nothing)
    assert (found["kept"], found["both"], found["either"], found["jaccard"], found["share"]) == ([0, 0], 0, 0, 1.0, 0.0)


def test_random_masks_overlap_as_chance_says():
    draw = [torch.rand(100_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    one, other = (masks.levels({"w": scores}, 0.7).mask() for scores in draw)
    found = mask_statistics.overlap(one, other)
    assert found["by_chance"] == pytest.approx(0.09)
    assert found["share"] == pytest.approx(0.09, abs=0.004)  # four standard deviations


def test_masks_of_other_layers_or_shapes_are_not_compared():
    with pytest.raises(ValueError, match="different projections: c stands in one of them only"):
        mask_statistics.overlap(ONE, OTHER | {"c": ONE["a"]})
    with pytest.raises(ValueError, match=r"masks of a have different shapes: \(2, 2\) and \(4,\)"):
        mask_statistics.union(ONE, OTHER | {"a": ONE["b"]})
    with pytest.raises(ValueError, match="nothing to compare"):
        mask_statistics.intersection({}, {})
    with pytest.raises(ValueError, match="nothing to count"):
        mask_statistics.counts({})


def test_layers_stand_in_the_bins_of_their_own_sparsity():
    def layer(gone: int) -> torch.Tensor:
        return torch.arange(10) >= gone

    mask = {str(at): layer(gone) for at, gone in enumerate([0, 1, 3, 3, 7, 10])}
    found = mask_statistics.histogram(mask)
    assert found["edges"] == [at / 10 for at in range(11)]
    assert found["layers"] == [1, 1, 0, 2, 0, 0, 0, 1, 0, 1]
    assert mask_statistics.histogram(mask_statistics.counts(mask)) == found
    assert mask_statistics.histogram(mask, bins=2)["layers"] == [4, 2]
    with pytest.raises(ValueError, match="bins must be at least 1"):
        mask_statistics.histogram(mask, bins=0)


def test_on_a_linear_loss_the_signed_prediction_is_exact_and_the_absolute_one_a_bound():
    generator = torch.Generator().manual_seed(0)
    weight, slope = (torch.randn(40, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = masks.levels({"w": (weight * slope).abs().float()}, 0.5).mask()
    measured = float((slope * weight * mask["w"]).sum() - (slope * weight).sum())
    signed = mask_statistics.predicted_loss_change(mask, {"w": -weight * slope}, measured)
    bound = mask_statistics.predicted_loss_change(mask, {"w": (weight * slope).abs()}, measured)
    assert signed["predicted"] == pytest.approx(measured, rel=1e-12) and abs(signed["difference"]) < 1e-10
    assert bound["predicted"] >= abs(measured) and bound["per_layer"]["w"] == bound["predicted"]
    assert bound["difference"] == measured - bound["predicted"]


def test_on_a_model_the_first_order_prediction_is_the_measured_change_where_the_weights_are_small():
    model = small_models.build("llama").double()
    ids = small_models.ids(4, 16)

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    before = loss()
    before.backward()
    weights = masks.weights(model)
    taylor = {name: -one * model.get_parameter(name).grad for name, one in weights.items()}
    mask = {name: ~((one.abs() < 0.005) & (taylor[name] > 0)) for name, one in weights.items()}  # none cancels another
    masks.apply(model, mask)
    with torch.no_grad():
        measured = float(loss() - before)
    found = mask_statistics.predicted_loss_change(mask, taylor, measured)
    assert abs(measured) > 1e-6, "there is something to predict"
    assert abs(found["difference"]) < 0.05 * abs(measured)


def test_scores_that_do_not_fit_are_refused():
    scores = {name: torch.ones_like(one, dtype=torch.float32) for name, one in ONE.items()}
    with pytest.raises(ValueError, match="scores of c do not fit the mask"):
        mask_statistics.predicted_loss_change(ONE, scores | {"c": torch.ones(1)})
    with pytest.raises(ValueError, match="scores of b are missing"):
        mask_statistics.predicted_loss_change(ONE, [("a", scores["a"])])
    found = mask_statistics.predicted_loss_change(ONE, scores)
    assert found == {"predicted": 3.0, "measured": None, "difference": None, "per_layer": {"a": 2.0, "b": 1.0}}
