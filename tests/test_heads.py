"""Are the scores what their formulas say, and are the heads closed that have the lowest ones?"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import NAMES, OUTPUT, attention_by_hand, build, ids, text_rows, zero_by_hand
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nbhelpers import attention, heads, models, quantization
from nbhelpers.architecture import Geometry, geometry
from nbhelpers.heads import STRATEGIES
from nbhelpers.tracking import Interrupted

ROWS = text_rows()
LOOKING = [name for name in STRATEGIES if name != "random"]


def gated(name: str, closed=(), **options):
    model = build(name, **options)
    attention.install(model)
    attention.close_heads(model, closed)
    return model


def naive_loss(model, rows=ROWS) -> float:
    """Mean nll over all scored tokens, a row at a time."""
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            out = model(row["input_ids"][None]).logits[0, :-1].double()
            total += F.cross_entropy(out, row["labels"][1:], reduction="sum").item()
            tokens += len(row["labels"]) - 1
    return total / tokens


# ----------------------------------------------------------------------------------------- the contract of a strategy


@pytest.mark.parametrize("strategy", STRATEGIES.names())
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_gives_finite_repeatable_scores_and_leaves_the_model_as_it_was(strategy, name):
    model = gated(name, [(0, 2)])
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, wanted = models.fingerprint(model), [p.requires_grad for p in model.parameters()]
    scores = STRATEGIES[strategy](model, ROWS, seed=3)
    assert scores.shape == (geometry(model.config).layers, 4) and scores.dtype == torch.float64
    assert scores.isfinite().all() and not scores.requires_grad
    assert torch.equal(scores, STRATEGIES[strategy](model, ROWS, seed=3))
    assert models.fingerprint(model) == before and attention.closed_heads(model) == [(0, 2)]
    assert model.training and [p.requires_grad for p in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("strategy", LOOKING)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("closed", [[], [(0, 0), (1, 1)]], ids=["whole", "pruned"])
def test_a_planted_dead_head_is_found_and_taken_out_again(strategy, name, closed):
    model = gated(name, closed)
    before = models.fingerprint(model)
    found, score = heads.finds_dead_head(model, ROWS, strategy, (1, 2))
    assert found and score == pytest.approx(heads.DEAD, abs=1e-5)
    assert models.fingerprint(model) == before
    assert STRATEGIES[strategy](model, ROWS)[1, 2].abs() > 1e-3, "the head was alive to begin with"


def test_random_scores_do_not_find_a_dead_head():
    assert not heads.finds_dead_head(gated("llama"), ROWS, "random", (1, 2))[0]


def test_a_planted_head_is_taken_out_after_an_error():
    model = gated("gpt_neox")
    before = models.fingerprint(model)
    planted = []

    def fail():
        with heads.planted_dead_head(model, (0, 1)):
            planted.append(models.fingerprint(model))
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    assert planted != [before]
    assert models.fingerprint(model) == before


@pytest.mark.parametrize("strategy", LOOKING)
def test_scores_do_not_depend_on_the_seed_unless_they_are_random(strategy):
    model = gated("gpt2")
    assert torch.equal(STRATEGIES[strategy](model, ROWS, seed=1), STRATEGIES[strategy](model, ROWS, seed=2))


@pytest.mark.parametrize("strategy", LOOKING)
def test_scores_of_rows_do_not_depend_on_how_they_are_batched(strategy, monkeypatch):
    model = gated("llama")
    together = STRATEGIES[strategy](model, ROWS)
    monkeypatch.setattr("nbhelpers.evaluate.batch_rows", lambda model, length: 1)
    torch.testing.assert_close(STRATEGIES[strategy](model, ROWS), together, rtol=1e-4, atol=1e-5)


def test_random_scores_differ_by_seed_and_between_layers_and_leave_the_global_generator_alone():
    model, state = gated("llama"), torch.get_rng_state()
    first, second = (STRATEGIES["random"](model, ROWS, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- each formula on its own


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_is_the_norm_of_a_heads_slice_of_the_projection(name):
    model, dim = gated(name), 16 if name == "qwen3" else 8
    scores = STRATEGIES["magnitude"](model, [])
    for layer in range(2):
        weight = getattr(attention_by_hand(model, name, layer), OUTPUT.get(name, "o_proj")).weight.tolist()
        for head in range(4):
            inside = range(head * dim, (head + 1) * dim)
            if name == "gpt2":
                squares = sum(x * x for at in inside for x in weight[at])
            else:
                squares = sum(row[at] ** 2 for row in weight for at in inside)
            assert scores[layer, head].item() == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_entropy_scores_1_for_a_head_that_looks_at_one_token_and_0_for_one_that_looks_evenly():
    model = gated("gpt2")
    module = attention_by_hand(model, "gpt2", 0)
    with torch.no_grad():
        module.c_attn.weight[:, : 2 * 32].zero_()  # no query and no key looks at the text
        module.c_attn.bias[: 2 * 32].zero_()
    assert STRATEGIES["entropy"](model, ROWS)[0].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    with torch.no_grad():  # head 2: key = x, query = 100 x after the norm, so a token sees itself (all tokens differ)
        model.transformer.h[0].ln_1.bias.zero_()
        block = torch.eye(32)[:, :8]
        module.c_attn.weight[:, 16:24], module.c_attn.weight[:, 32 + 16 : 32 + 24] = 1000 * block, 1000 * block
    assert STRATEGIES["entropy"](model, ROWS)[0, 2] > 0.95


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "mistral_window", "qwen3"])
def test_gradient_is_the_mean_over_rows_of_the_absolute_gradient_normalised_by_layer(name):
    model, rows = gated(name, [(1, 3)]), text_rows((16, 9, 12))
    modules, layers = attention.attention_modules(model), geometry(model.config).layers
    total = torch.zeros(layers, 4, dtype=torch.float64)
    kept = [module.head_gate for module in modules]
    for row in rows:  # one row, one backward
        for module, gate in zip(modules, kept, strict=True):
            module.head_gate = (torch.ones(4) if gate is None else gate.clone()).requires_grad_()
        out = model(row["input_ids"][None]).logits[0, :-1]
        F.cross_entropy(out, row["labels"][1:]).backward()
        total += torch.stack([module.head_gate.grad.abs().double() for module in modules])
    for module, gate in zip(modules, kept, strict=True):
        module.head_gate = gate
    model.zero_grad()
    mean = total / len(rows)
    mean[1, 3] = 0.0
    expected = torch.stack([row / math.sqrt(sum(x * x for x in row.tolist())) for row in mean])
    torch.testing.assert_close(STRATEGIES["gradient"](model, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "mixtral"])
@pytest.mark.parametrize("closed", [[], [(0, 2)]], ids=["whole", "pruned"])
def test_ablation_is_the_loss_with_the_head_zeroed_by_hand_less_the_loss_before(name, closed):
    rows = text_rows((16, 9, 12))
    scores = STRATEGIES["ablation"](gated(name, closed), rows)
    base = build(name)
    zero_by_hand(base, name, closed)
    before = naive_loss(base, rows)
    for head in [(0, 0), (0, 2), (1, 1), (1, 3)]:
        without = build(name)
        zero_by_hand(without, name, [*closed, head])
        assert scores[head].item() == pytest.approx(naive_loss(without, rows) - before, abs=2e-5)


def test_prompt_tokens_count_in_no_score_that_is_about_the_loss():
    model = gated("llama")
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"].clone()} for row in ROWS]
    for row in rows:
        row["labels"][:6] = -100
    for strategy in ("gradient", "ablation"):
        assert not torch.allclose(STRATEGIES[strategy](model, rows), STRATEGIES[strategy](model, ROWS))


def test_strategies_that_read_or_plant_weights_refuse_four_bit_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    quantization.mend_4bit_on_cpu(model)
    attention.install(model)
    for call in (
        lambda: STRATEGIES["magnitude"](model, ROWS),
        lambda: heads.finds_dead_head(model, ROWS, "gradient", (0, 0)),
    ):
        with pytest.raises(ValueError, match="needs 16- or 32-bit weights, got a quantised model; load it without"):
            call()


# ------------------------------------------------------------------------------------------------- how many, and which


@pytest.mark.parametrize(
    "level, total, expected",
    [
        (0, 40, 0),
        (0.0, 40, 0),
        (1, 40, 40),
        (1.0, 40, 40),
        (0.3, 40, 12),
        (0.5, 5, 2),  # 2.5
        (0.5, 3, 2),  # 1.5
        (0.5, 1, 0),  # 0.5
        (0.25, 10, 2),  # 2.5
        (0.35, 10, 4),  # 3.5
        (0.15, 10, 2),  # 1.5
        (0.45, 10, 4),  # 4.5
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (0.07, 150, 10),  # 10.5, in binary 10.500000000000002
        (0.35, 90, 32),  # 31.5, in binary 31.499999999999996
        (0.9, 40, 36),
        (0.1, 4, 0),
        (0.999, 40, 40),
    ],
)
def test_the_number_of_heads_is_the_exact_decimal_share_rounded_half_to_even(level, total, expected):
    assert heads.count(level, total) == expected


@pytest.mark.parametrize("level", [-0.01, 1.01, 30, float("nan"), float("inf")])
def test_a_level_outside_0_to_1_is_refused(level):
    with pytest.raises(ValueError, match=rf"level must be in \[0, 1\], got {level}"):
        heads.count(level, 10)


GEO = Geometry(layers=2, heads=4, kv_heads=2, head_dim=8)
SCORES = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.7, 0.4, 0.05]], dtype=torch.float64)


def test_the_least_important_heads_are_chosen_in_the_order_of_their_scores():
    assert heads.choose(SCORES, 3, GEO) == [(1, 3), (0, 0), (0, 2)]
    assert heads.choose(SCORES, 0, GEO) == []
    assert sorted(heads.choose(SCORES, 8, GEO)) == heads.all_heads(2, 4)


def test_equal_scores_go_by_layer_then_head():
    assert heads.choose(torch.ones(2, 4), 5, GEO) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_heads_that_are_closed_are_not_chosen_again():
    assert heads.choose(SCORES, 2, GEO, closed=[(1, 3), (0, 2)]) == [(0, 0), (1, 0)]


def test_a_layer_keeps_its_minimum_also_counting_what_was_closed_before():
    low = torch.tensor([[0.0, 0.1, 0.2, 0.3], [1.0, 1.1, 1.2, 1.3]])
    assert heads.choose(low, 4, GEO, min_per_layer=2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert heads.choose(low, 2, GEO, closed=[(0, 3)], min_per_layer=2) == [(0, 0), (1, 0)]


def test_groups_go_whole_by_their_mean():
    # means: 0.5, 0.5 | 0.5, 0.225
    assert heads.choose(SCORES, 4, GEO, group_size=2) == [(1, 2), (1, 3), (0, 0), (0, 1)]
    assert heads.choose(SCORES, 4, GEO, group_size=2, min_per_layer=3) == []
    assert heads.choose(SCORES, 8, GEO, group_size=2, min_per_layer=2) == [(1, 2), (1, 3), (0, 0), (0, 1)]


def test_what_is_closed_at_a_lower_level_is_closed_at_every_higher_one():
    closed = [set(heads.choose(SCORES, number, GEO)) for number in range(9)]
    assert all(fewer < more for fewer, more in itertools.pairwise(closed))


# ------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_one_shot_closes_the_heads_with_the_lowest_scores_of_the_whole_model(strategy):
    model = gated("llama")
    scores = STRATEGIES[strategy](model, ROWS, seed=5)
    selection = heads.prune(model, ROWS, strategy, 0.25, seed=5)
    lowest = sorted(heads.all_heads(3, 4), key=lambda head: scores[head].item())[:3]
    assert selection.closed == sorted(lowest) == attention.closed_heads(model) == selection.newly_closed
    assert len(selection.rounds) == 1 and selection.scores == scores.tolist()


def test_one_shot_levels_are_nested():
    closed = [set(heads.prune(gated("llama"), ROWS, "random", level, seed=2).closed) for level in (0.25, 0.5, 0.75)]
    assert closed[0] < closed[1] < closed[2]


def test_random_pruning_differs_by_seed_and_repeats_for_a_seed():
    first, again, other = (heads.prune(gated("llama"), ROWS, "random", 0.5, seed=seed).closed for seed in (0, 0, 1))
    assert first == again != other


def test_iterative_scores_again_after_every_round_with_the_heads_closed_so_far():
    model = gated("llama")
    selection = heads.prune(model, ROWS, "ablation", 0.5, iterative=True, heads_per_round=2)
    assert [len(number["closed"]) for number in selection.rounds] == [2, 2, 2]
    closed: list = []
    for number in selection.rounds:  # each round again, from a fresh model
        scores = STRATEGIES["ablation"](gated("llama", closed), ROWS)
        assert number["scores"] == scores.tolist()
        open_heads = [head for head in heads.all_heads(3, 4) if head not in closed]
        lowest = sorted(open_heads, key=lambda head: scores[head].item())[:2]
        assert [tuple(head) for head in number["closed"]] == lowest
        closed += lowest
    assert selection.closed == sorted(closed) == attention.closed_heads(model)


def test_a_round_is_a_twentieth_of_all_heads_unless_told_otherwise():
    # 12 heads: a twentieth is 0.6, at least one head
    selection = heads.prune(gated("llama"), ROWS, "magnitude", 0.5, iterative=True)
    assert [len(number["closed"]) for number in selection.rounds] == [1] * 6
    selection = heads.prune(gated("llama"), ROWS, "magnitude", 0.5, iterative=True, heads_per_round=4)
    assert [len(number["closed"]) for number in selection.rounds] == [4, 2]


@pytest.mark.parametrize("iterative", [False, True])
def test_whole_groups_of_heads_that_share_keys_go_together(iterative):
    model = gated("llama")
    selection = heads.prune(model, ROWS, "gradient", 0.5, kv_groups=True, iterative=iterative, heads_per_round=3)
    assert len(selection.closed) == 6 and selection.group_size == 2
    assert {(layer, head // 2) for layer, head in selection.closed} == {
        (layer, head // 2) for layer, head in selection.closed if head % 2
    }
    assert len(selection.rounds) == (3 if iterative else 1), "three heads a round are one group"


def test_every_layer_keeps_its_minimum():
    model = gated("llama")
    for parameter in attention_by_hand(model, "llama", 0).o_proj.parameters():
        parameter.data *= 1e-3  # all of layer 0 looks unimportant
    selection = heads.prune(model, ROWS, "magnitude", 0.5, min_per_layer=1)
    assert sorted(layer for layer, _ in selection.closed).count(0) == 3 and len(selection.closed) == 6


def test_pruning_again_adds_to_what_is_closed():
    model = gated("llama")
    first = heads.prune(model, ROWS, "gradient", 0.25)
    second = heads.prune(model, ROWS, "gradient", 0.5)
    assert set(first.closed) < set(second.closed) == set(attention.closed_heads(model))
    assert len(second.newly_closed) == 3 and not set(second.newly_closed) & set(first.closed)
    assert heads.prune(model, ROWS, "gradient", 0.5).rounds == []


@pytest.mark.parametrize("name", NAMES)
def test_level_1_closes_everything_and_the_model_still_computes(name):
    model = gated(name)
    selection = heads.prune(model, ROWS, "magnitude", 1.0)
    assert selection.closed == heads.all_heads(geometry(model.config).layers, 4)
    assert math.isfinite(naive_loss(model))
    assert all(STRATEGIES[strategy](model, ROWS).isfinite().all() for strategy in STRATEGIES)


def test_level_0_closes_nothing_and_scores_nothing():
    selection = heads.prune(gated("llama"), ROWS, "gradient", 0)
    assert selection.closed == selection.rounds == selection.scores == []


def test_stop_is_seen_before_every_round_and_leaves_whole_rounds():
    model, told = gated("llama"), []
    with pytest.raises(Interrupted, match="stopped with 4 of 6 heads closed"):
        heads.prune(
            model,
            ROWS,
            "magnitude",
            0.5,
            iterative=True,
            heads_per_round=2,
            progress=told.append,
            should_stop=lambda: len(told) == 2,
        )
    assert told == [{"done": 2, "total": 6}, {"done": 4, "total": 6}]
    assert len(attention.closed_heads(model)) == 4
    logits = model(ids()).logits
    assert logits.isfinite().all()
    assert len(heads.prune(model, ROWS, "magnitude", 0.5).closed) == 6, "it can go on from there"


@pytest.mark.parametrize(
    "closed, options, says",
    [
        ([], {"strategy": "entrpy"}, "unknown strategy 'entrpy'. Did you mean 'entropy'"),
        ([], {"level": 1.5}, r"level must be in \[0, 1\], got 1.5"),
        ([(0, 0), (0, 1)], {"level": 0.1}, "level 0.1 means 1 closed heads, the model already has 2; raise level"),
        (
            [],
            {"level": 0.9, "min_per_layer": 2},
            "cannot close 11 of 12 heads and keep 2 in each of 3 layers: at most 6",
        ),
        ([], {"min_per_layer": 5}, r"min_heads_per_layer must be in \[0, 4\], got 5"),
        ([(0, 0)], {"kv_groups": True}, "kv_groups needs whole groups, the model already has single closed heads"),
        ([(0, 1)], {"kv_groups": True}, "kv_groups needs whole groups, the model already has single closed heads"),
        ([], {"kv_groups": True, "level": 0.7, "min_per_layer": 1}, "keep 1 in each of 3 layers: at most 6"),
        ([(0, at) for at in range(4)], {"level": 1, "min_per_layer": 2}, "cannot close 12 of 12 heads .* at most 8"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_a_head_is_closed(closed, options, says):
    model = gated("llama", closed)
    with pytest.raises((ValueError, LookupError), match=says):
        heads.prune(model, ROWS, **{"strategy": "magnitude", "level": 0.5, **options})
    assert attention.closed_heads(model) == closed


def test_scores_that_are_not_finite_close_nothing(monkeypatch):
    model = gated("llama")
    broken = torch.full((3, 4), float("nan"), dtype=torch.float64)
    monkeypatch.setitem(STRATEGIES._entries, "magnitude", lambda model, rows, seed=0: broken)
    with pytest.raises(FloatingPointError, match="strategy 'magnitude' gave a score that is not finite; try float32"):
        heads.prune(model, ROWS, "magnitude", 0.5)
    assert attention.closed_heads(model) == []
