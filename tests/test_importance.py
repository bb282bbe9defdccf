"""Is every score what its formula says, worked out another way, and is the model left as it was?"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import NAMES, build, text_rows

from nbhelpers import attention, data, evaluate, importance, layer_inputs, losses, models, sparsegpt
from nbhelpers.importance import IMPORTANCE
from nbhelpers.projections import projections
from nbhelpers.tracking import Interrupted

ALL = IMPORTANCE.names()
BY_DATA = [name for name in ALL if name not in ("random", "magnitude")]
BY_GRADIENT = ["gradient", "gradient_sum", "gradient_squared", "taylor", "taylor_squared"]
WITHOUT_BATCHES = [name for name in BY_DATA if name not in ("gradient", "gradient_squared")]  # what a batch is matters


def prompted(lengths=(16, 9, 12, 14)) -> list[dict]:
    """Rows of unequal length whose first tokens are prompt."""
    rows = [{name: ids.clone() for name, ids in row.items()} for row in text_rows(lengths)]
    for number, row in enumerate(rows):
        row["labels"][: 2 + number] = data.IGNORED
    return rows


ROWS = prompted()


def scored(model, name, rows=ROWS, **options) -> dict[str, torch.Tensor]:
    return dict(importance.scores(model, name, rows, **options))


def row_loss(model, row) -> torch.Tensor:
    """Mean nll of a row's labels, one row, no padding, plain transformers."""
    return F.cross_entropy(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], ignore_index=-100)


@cache
def gradients_by_hand(name: str) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Of each row's mean nll, by a full backward pass, in float64; and each row's scored tokens."""
    model, found = build(name).double(), []
    if name == "mixtral":
        model.set_experts_implementation("eager")
    names = [one.name for one in projections(model).covered]
    for row in ROWS:
        model.zero_grad()
        row_loss(model, row).backward()
        found.append({name: model.get_parameter(name).grad.clone() for name in names})
    return found, [int((row["labels"][1:] != -100).sum()) for row in ROWS]


def close(found: dict, expected: dict) -> None:
    """Equal to float32 beside the largest score of each projection."""
    assert list(found) == list(expected)
    for name, score in found.items():
        wanted = expected[name].float()
        torch.testing.assert_close(score, wanted, rtol=1e-3, atol=2e-5 * wanted.abs().max().item(), msg=name)


# ---------------------------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mixtral", "phi3"])
def test_scores_are_float32_of_the_stored_shape_in_order_finite_and_repeatable(strategy, name):
    model = build(name)
    found = list(importance.scores(model, strategy, ROWS, seed=3))
    assert [one for one, _ in found] == [one.name for one in projections(model).covered]
    for name_, score in found:
        assert score.shape == model.get_parameter(name_).shape and score.dtype == torch.float32
        assert score.isfinite().all() and (score >= 0).all() and not score.requires_grad and score.device.type == "cpu"
        assert score.unique().numel() > 1
    again = scored(model, strategy, seed=3)
    assert all(torch.equal(score, again[name_]) for name_, score in found)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_the_model_is_as_it_was_between_scores_after_them_and_after_a_stop(strategy, name, monkeypatch):
    monkeypatch.setattr(importance, "ACCUMULATOR_BYTES", 1)  # several passes
    model = build(name).train()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = kept = torch.ones_like(second)
    before, wanted = models.fingerprint(model), [p.requires_grad for p in model.parameters()]

    def check():
        assert models.fingerprint(model) == before and second.grad is kept and kept.eq(1).all()
        assert [p.requires_grad for p in model.parameters()] == wanted
        assert all(p.grad is None for p in model.parameters() if p is not second)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    for _ in importance.scores(model, strategy, ROWS):
        check()
    check()
    with pytest.raises(Interrupted, match="stopped after 1 of "):
        scored(model, strategy, batch_size=2, should_stop=lambda: True)
    check()


@pytest.mark.parametrize("strategy", ALL)
def test_the_seed_changes_random_scores_and_no_others(strategy):
    model = build("llama")
    one, other = (scored(model, strategy, seed=seed) for seed in (0, 1))
    assert all(torch.equal(one[name], other[name]) == (strategy != "random") for name in one)


@pytest.mark.parametrize("strategy", WITHOUT_BATCHES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_how_rows_are_batched_changes_no_score_whose_formula_does_not_speak_of_batches(strategy, name):
    model = build(name)
    close(scored(model, strategy, batch_size=1), scored(model, strategy, batch_size=3))


@pytest.mark.parametrize("strategy", ALL)
def test_scores_made_in_one_pass_or_in_many_are_the_same(strategy, monkeypatch):
    model, steps = build("llama"), []
    together = scored(model, strategy, batch_size=2, progress=steps.append)
    monkeypatch.setattr(importance, "ACCUMULATOR_BYTES", 4 * 48 * 48)
    apart = scored(model, strategy, batch_size=2, progress=(more := []).append)
    assert all(torch.equal(together[name], apart[name]) for name in together)
    for seen in (steps, more):
        assert [one["done"] for one in seen] == list(range(1, seen[-1]["total"] + 1))
    grouped = [*BY_GRADIENT, "sparsegpt"]
    assert (len(more) > len(steps)) == (strategy in grouped)


@pytest.mark.parametrize("strategy", BY_GRADIENT)
def test_never_more_than_one_gradient_is_alive_nor_any_but_those_of_the_group(strategy, monkeypatch):
    model, seen = build("llama"), []
    monkeypatch.setattr(importance, "ACCUMULATOR_BYTES", 2 * 4 * 48 * 32)  # two of the MLP's weights
    for one in projections(model).covered:
        model.get_parameter(one.name).register_post_accumulate_grad_hook(
            lambda _: seen.append(
                (sum(p.grad is not None for p in model.parameters()), sum(p.requires_grad for p in model.parameters()))
            )
        )
    scored(model, strategy)
    assert {alive for alive, _ in seen} == {1} and max(wanted for _, wanted in seen) <= 4


def test_an_unknown_importance_missing_rows_and_nonsense_are_refused_before_any_score():
    model = build("gpt2")
    with pytest.raises(LookupError, match="unknown importance 'wnada'. Did you mean 'wanda'"):
        importance.scores(model, "wnada")
    with pytest.raises(LookupError, match="unknown importance 'fisher'"):
        importance.needs_data("fisher")
    for name in BY_DATA:
        assert importance.needs_data(name)
        for rows in (None, []):
            with pytest.raises(ValueError, match=f"importance '{name}' looks at data: give rows.*random, magnitude"):
                importance.scores(model, name, rows)
    assert not importance.needs_data("random") and not importance.needs_data("magnitude")
    with pytest.raises(ValueError, match="batch_size must be at least 1 row, got 0"):
        importance.scores(model, "wanda", ROWS, batch_size=0)


def test_every_estimator_names_itself_and_no_two_are_the_same():
    said = [importance.estimator(name) for name in ALL]
    assert len(set(said)) == len(ALL) and all(said)
    assert importance.estimator("gradient_squared").startswith("sum over batches of g^2")


@pytest.mark.parametrize("strategy", BY_GRADIENT)
def test_rows_without_a_label_have_no_loss(strategy):
    rows = [{"input_ids": row["input_ids"], "labels": torch.full_like(row["labels"], -100)} for row in ROWS]
    with pytest.raises(ValueError, match="no token is scored: every label is masked"):
        scored(build("gpt2"), strategy, rows)
    some = scored(build("gpt2"), strategy, [*ROWS, *rows], batch_size=1)
    close(some, scored(build("gpt2"), strategy, ROWS, batch_size=1))


@pytest.mark.parametrize("strategy", [name for name in ALL if name != "random"])
def test_a_score_that_is_no_number_stops_by_name(strategy):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"(importance '\w+'|inputs) of model\.layers\.\d\.\w+\.\w+\.weight"):
        scored(model, strategy)


def test_quantised_weights_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.quant_state = object()  # as bitsandbytes marks 4-bit weights
    for strategy in ALL:
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is quantised, so its numbers"):
            importance.scores(model, strategy, ROWS)


# ------------------------------------------------------------------------------------------------- formulas, one by one


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_is_the_absolute_weight(name):
    model = build(name)
    for name_, score in scored(model, "magnitude", None).items():
        assert torch.equal(score, model.get_parameter(name_).detach().abs())


def test_magnitude_of_half_precision_weights_is_exact():
    model = build("llama").bfloat16()
    for name, score in scored(model, "magnitude", None).items():
        assert torch.equal(score, model.get_parameter(name).detach().float().abs())


def test_random_scores_differ_between_layers_and_leave_the_global_generator_alone():
    model, state = build("llama"), torch.get_rng_state()
    found = scored(model, "random", None)
    parts = [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])
    together = torch.cat([score.flatten() for score in found.values()])
    assert together.mean().item() == pytest.approx(0.5, abs=0.01) and together.max() < 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mixtral", "phi3"])
def test_gradient_is_the_sum_over_rows_of_the_absolute_gradient_of_a_plain_backward_pass(name):
    rows, _ = gradients_by_hand(name)
    close(scored(build(name), "gradient"), {one: sum(row[one].abs() for row in rows) for one in rows[0]})


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mixtral", "phi3"])
def test_gradient_squared_is_the_sum_over_rows_of_the_squares(name):
    rows, _ = gradients_by_hand(name)
    close(scored(build(name), "gradient_squared"), {one: sum(row[one] ** 2 for row in rows) for one in rows[0]})


@pytest.mark.parametrize("strategy", ["gradient_sum", "taylor", "taylor_squared"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mixtral", "phi3"])
def test_one_gradient_of_all_tokens_is_behind_the_linear_estimators(strategy, name):
    rows, tokens = gradients_by_hand(name)
    weight = build(name).double().get_parameter
    mean = {
        one: sum(row[one] * count for row, count in zip(rows, tokens, strict=True)) / sum(tokens) for one in rows[0]
    }
    by_hand = {
        "gradient_sum": lambda one: mean[one].abs(),
        "taylor": lambda one: (weight(one).detach() * mean[one]).abs(),
        "taylor_squared": lambda one: (weight(one).detach() * mean[one]) ** 2,
    }[strategy]
    close(scored(build(name), strategy), {one: by_hand(one) for one in mean})


def test_a_batch_is_what_the_batch_size_says():
    model = build("llama").double()
    found = scored(model, "gradient", batch_size=2)
    total: dict = {}
    for pair in (ROWS[:2], ROWS[2:]):
        model.zero_grad()
        tokens = [int((row["labels"][1:] != -100).sum()) for row in pair]
        loss = sum(row_loss(model, row) * count for row, count in zip(pair, tokens, strict=True)) / sum(tokens)
        loss.backward()
        for one in found:
            total[one] = total.get(one, 0) + model.get_parameter(one).grad.abs()
    close(found, total)


def test_on_a_quadratic_taylor_is_twice_the_true_change_of_the_loss(monkeypatch):
    """L = c / 2 sum of w^2: setting w to 0 changes it by -c w^2 / 2, and |w g| = c w^2."""
    model, c = build("llama"), 3.0
    weights = [model.get_parameter(one.name) for one in projections(model).covered]

    def quadratic(model, batch):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        return tokens * c / 2 * sum((weight**2).sum() for weight in weights)

    monkeypatch.setattr(losses, "nll_sum", quadratic)
    change = {one.name: c / 2 * model.get_parameter(one.name).detach() ** 2 for one in projections(model).covered}
    close(scored(model, "taylor"), {name: 2 * value for name, value in change.items()})


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_taylor_is_the_slope_of_the_measured_loss_as_a_weight_shrinks(name):
    model, step = build(name).double(), 3e-3  # some norms compute in float32
    if name == "mixtral":
        model.set_experts_implementation("eager")
    counts = [int((row["labels"][1:] != -100).sum()) for row in ROWS]

    @torch.no_grad()
    def loss() -> float:
        parts = [row_loss(model, row).item() * count for row, count in zip(ROWS, counts, strict=True)]
        return sum(parts) / sum(counts)

    found = scored(model, "taylor")
    for one in list(found)[:: max(1, len(found) // 4)]:
        flat, at = model.get_parameter(one).data.view(-1), int(found[one].argmax())
        kept, ends = flat[at].item(), []
        for factor in (1 - step, 1 + step):
            flat[at] = kept * factor
            ends.append(loss())
        flat[at] = kept
        slope = abs(ends[1] - ends[0]) / (2 * step)
        assert slope == pytest.approx(found[one].max().item(), rel=2e-3), one


def inputs_by_hand(model, name: str) -> dict[str, torch.Tensor]:
    """What each Linear or Conv1D reads, a row at a time, without padding: (tokens, inputs), float64."""
    seen: dict[str, list] = {}
    hooks = [
        model.get_submodule(one.module).register_forward_hook(
            lambda _, arguments, __, key=one.name: seen.setdefault(key, []).append(
                arguments[0].detach().reshape(-1, arguments[0].shape[-1]).double()
            )
        )
        for one in projections(model).covered
    ]
    with torch.no_grad():
        for row in ROWS:
            model(row["input_ids"][None])
    for hook in hooks:
        hook.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixtral"])
def test_wanda_is_the_weight_times_the_norm_of_what_it_reads_without_padding(name):
    model = build(name)
    tokens, expected = sum(len(row["input_ids"]) for row in ROWS), {}
    for one, inputs in inputs_by_hand(model, name).items():
        assert len(inputs) == tokens
        norms = [math.sqrt(sum(x * x for x in column)) for column in inputs.T.tolist()]
        weight = model.get_parameter(one).detach().abs()
        shape = (-1, 1) if name == "gpt2" else (1, -1)  # Conv1D: (in, out)
        expected[one] = weight * torch.tensor(norms).view(shape)
    found = scored(model, "wanda")
    close(found, {one: expected[one] for one in found})


def expert_inputs_by_hand(model) -> dict[str, dict[int, torch.Tensor]]:
    """name -> expert -> (tokens, inputs): routed by the router's weights, worked out token by token, float64."""
    seen: dict[int, list] = {}
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _, arguments, __, key=number: seen.setdefault(key, []).append(arguments[0].detach().double()[0])
        )
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for row in ROWS:
            model(row["input_ids"][None])
    for hook in hooks:
        hook.remove()
    found: dict[str, dict[int, torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        mlp, tokens = layer.mlp, torch.cat(seen[number])
        chosen = (tokens @ mlp.gate.weight.double().T).topk(2, -1).indices
        for expert in range(4):
            reads = tokens[[expert in row for row in chosen.tolist()]]
            gate, up = (reads @ mlp.experts.gate_up_proj[expert].double().T).detach().split(48, -1)
            prefix = f"model.layers.{number}.mlp.experts."
            found.setdefault(prefix + "gate_up_proj", {})[expert] = reads
            found.setdefault(prefix + "down_proj", {})[expert] = F.silu(gate) * up
    return found


def test_wanda_of_experts_is_by_the_tokens_that_each_was_given():
    model = build("mixtral")
    found = scored(model, "wanda")
    by_hand = expert_inputs_by_hand(model)
    assert len(by_hand) == 4
    for name, experts in by_hand.items():
        for expert, inputs in experts.items():
            expected = model.get_parameter(name)[expert].detach().abs() * inputs.norm(dim=0).float()
            torch.testing.assert_close(found[name][expert], expected, rtol=1e-4, atol=1e-6)


def test_sparsegpt_is_the_square_over_the_diagonal_of_the_inverse_worked_out_by_numpy():
    for name in ("gpt2", "llama"):
        model = build(name)
        found = scored(model, "sparsegpt")
        for one, inputs in inputs_by_hand(model, name).items():
            h = (inputs.T @ inputs).numpy()
            h += 0.01 * h.diagonal().mean() * torch.eye(len(h)).double().numpy()
            inverse = torch.from_numpy(np.linalg.inv(h)).diagonal()
            weight = model.get_parameter(one).detach().double() ** 2
            expected = weight / (inverse[:, None] if name == "gpt2" else inverse)
            torch.testing.assert_close(found[one], expected.float(), rtol=2e-2, atol=1e-4 * expected.max().item())


@pytest.mark.parametrize("strategy", ["wanda", "sparsegpt"])
def test_an_expert_that_saw_no_token_is_named(strategy):
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2] = 0
        model.model.layers[1].mlp.gate.weight[2, 0] = -1e4
        model.model.layers[1].post_attention_layernorm.weight[0] = 0
    rows = text_rows((3,))
    with pytest.raises(ValueError, match=r"layers\.\d\.mlp\.experts\.gate_up_proj: the router gave no token to expert"):
        scored(model, strategy, rows)


def test_an_expert_without_a_gradient_is_said(caplog):
    with caplog.at_level("WARNING"):
        scored(build("mixtral"), "taylor", text_rows((3,)))
    assert "is 0 for the whole of expert" in caplog.text


# --------------------------------------------------------------------------------------------------------- gated models


@pytest.mark.parametrize("strategy", BY_DATA)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_reads_a_closed_head_scores_exactly_0_and_what_reads_an_open_one_does_not(strategy, name):
    model = build(name)
    attention.install(model)
    attention.close_heads(model, [(0, 1)])
    found = scored(model, strategy)
    where = "transformer.h.0.attn.c_proj.weight" if name == "gpt2" else "model.layers.0.self_attn.o_proj.weight"
    columns = found[where].T if name != "gpt2" else found[where]
    assert (columns[8:16] == 0).all() and (columns[:8] > 0).any() and (columns[16:].amax(1) > 0).all()
    assert attention.closed_heads(model) == [(0, 1)]


def test_half_precision_is_scored_too():
    model, half = build("llama"), build("llama").bfloat16()
    for strategy in BY_DATA:
        found, exact = scored(half, strategy), scored(model, strategy)
        for one in found:
            both = torch.stack([found[one].flatten(), exact[one].flatten()])
            assert torch.corrcoef(both)[0, 1] > 0.9, (strategy, one)


# ------------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real(data_dir):
    loaded = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype="float32")
    rows = data.rows(loaded.tokenizer, data.read_documents(data_dir / "tinystories.jsonl"), 256, 16 * 256)
    return loaded.model, rows[:8], rows[8:]


@pytest.fixture
def whole(real):
    """The real model; its weights are put back after the test."""
    model = real[0]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield real
    model.load_state_dict(kept)


@torch.no_grad()
def zero_half(model, scores) -> None:
    """The lower half of each projection's scores, by hand."""
    for name, score in scores:
        gone = score.flatten().argsort(stable=True)[: score.numel() // 2]
        model.get_parameter(name).view(-1)[gone] = 0


@pytest.mark.parametrize("better, worse", [("magnitude", "random"), ("wanda", "magnitude"), ("sparsegpt", "magnitude")])
def test_at_half_of_each_layer_on_a_real_model_the_order_is_the_known_one(better, worse, whole):
    model, calibration, test = whole
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {}
    for strategy in (better, worse):
        scores = list(importance.scores(model, strategy, calibration))
        zero_half(model, scores)
        found[strategy] = evaluate.perplexity(model, test).perplexity
        model.load_state_dict(kept)
    assert evaluate.perplexity(model, test).perplexity < found[better] <= found[worse]


def test_the_update_makes_the_real_model_better_than_its_mask_alone(whole):
    model, calibration, test = whole
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = sparsegpt.prune(model, calibration, sparsity=0.5)
    updated = evaluate.perplexity(model, test).perplexity
    model.load_state_dict(kept)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    assert updated < evaluate.perplexity(model, test).perplexity
    assert sum(int(mask.sum()) for mask in masks.values()) * 2 == sum(mask.numel() for mask in masks.values())


def test_groups_hold_neighbours_up_to_the_limit_and_at_least_one():
    covered = projections(build("llama", num_hidden_layers=1)).covered
    sizes = [one.numbers for one in covered]
    assert sizes == [1024, 512, 512, 1024, 1536, 1536, 1536]  # q k v o gate up down
    found = layer_inputs.groups(covered, lambda one: one.numbers, 2048)
    assert [[one.numbers for one in group] for group in found] == [[1024, 512, 512], [1024], [1536], [1536], [1536]]
    assert layer_inputs.groups(covered, lambda one: one.numbers, 1) == [[one] for one in covered]
    assert layer_inputs.groups(covered, lambda one: one.numbers, sum(sizes)) == [list(covered)]
