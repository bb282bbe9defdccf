"""Does a model without its closed heads compute what it computed with them closed, and is it really smaller?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import NAMES, attention_by_hand, build, ids, text_rows, zero_by_hand
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nbhelpers import attention, compact, data, evaluate, facts, heads, models
from nbhelpers.architecture import Geometry
from nbhelpers.experiments import PruningConfig, PruningExperiment
from nbhelpers.tracking import Interrupted

pytest_plugins = ["model_fixtures"]

HIDDEN = 32
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
# every KV group of the grouped models has two heads; the second layer is the last one of most
EVEN = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
GROUP = [(1, 0), (1, 1)]
ONE_OF_EACH_GROUP = [(0, 1), (0, 2)]
FIRST_LAYER = [(0, head) for head in range(4)]
EVERYTHING = heads.all_heads(3, 4)
CLOSINGS = {
    "as many in each layer": EVEN,
    "a group": GROUP,
    "one of each group": ONE_OF_EACH_GROUP,
    "a first layer": [*FIRST_LAYER, (1, 2), (1, 3)],
    "all": EVERYTHING,
}
ROWS = text_rows((16, 11))
NO_HEAD_DIM = ["gpt2", "opt", "gpt_neox"]
LAYOUTS = [*NO_HEAD_DIM, "llama", "phi3"]  # one of each way to lay out the projections


def in_layers(model, closed):
    return [head for head in closed if head[0] < model.config.num_hidden_layers]


def gated(name: str, closed, dtype=torch.float32, **options):
    model = build(name, **options).to(dtype)
    if name == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    attention.install(model)
    attention.close_heads(model, in_layers(model, closed))
    return model


def removed(name: str, closed):
    return compact.remove_heads(gated(name, closed))


def oracle(name: str, closed, dtype=torch.float32):
    """Plain transformers, what the output projections read from the closed heads zeroed by hand."""
    model = build(name).to(dtype)
    if name == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("eager")
    zero_by_hand(model, name, in_layers(model, closed))
    return model


@torch.no_grad()
def logits(model, rows: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=rows, attention_mask=mask).logits


def padded(left: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rows = ids(3, 16)
    mask = torch.ones_like(rows)
    mask[1, :left] = 0
    mask[2, :1] = 0
    return rows, mask


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def written(model, rows: torch.Tensor, mask: torch.Tensor | None = None, **options) -> torch.Tensor:
    return model.generate(rows, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0, **options)


@pytest.fixture(scope="session")
def tokenizer():
    """Words of two letters: a tokenizer is saved with a model, nothing here is tokenised."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"ab": 0, "cd": 1}, unk_token="ab")))


# --------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_without_the_closed_heads_the_logits_are_those_with_them_zeroed(name, dtype):
    rows, mask = padded()
    model = gated(name, [], dtype)
    for what, closed in CLOSINGS.items():
        attention.close_heads(model, in_layers(model, closed))
        narrow, expected = compact.remove_heads(model), oracle(name, closed, dtype)
        assert relative(logits(narrow, rows), logits(expected, rows)) <= LIMIT[dtype], what
        real = mask.bool()
        here, there = logits(narrow, rows, mask)[real], logits(expected, rows, mask)[real]
        assert relative(here, there) <= LIMIT[dtype], f"{what}, padded"


@pytest.mark.parametrize("closed", CLOSINGS.values(), ids=list(CLOSINGS))
def test_the_closings_of_these_tests_change_what_the_models_compute(closed):
    assert relative(logits(oracle("llama", closed), ids()), logits(build("llama"), ids())) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_same_with_and_without_a_kv_cache_also_padded(name):
    rows, mask = (table[:, :8] for table in padded())
    for what in ("as many in each layer", "a first layer"):
        narrow, expected = (make(name, CLOSINGS[what]) for make in (removed, oracle))
        tokens = written(expected, rows, use_cache=False)
        for cache in (True, False):
            assert torch.equal(tokens, written(narrow, rows, use_cache=cache)), f"{what}, cache {cache}"
        assert torch.equal(written(narrow, rows, mask), written(expected, rows, mask)), f"{what}, padded"


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_counts_its_positions_also_where_layers_have_no_heads(name):
    narrow, expected = removed(name, FIRST_LAYER), oracle(name, FIRST_LAYER)
    rows, steps = ids(2, 9), []
    cache = None
    for at in range(rows.shape[1]):
        with torch.no_grad():
            output = narrow(input_ids=rows[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert cache.get_seq_length() == at + 1
        steps.append(output.logits)
    assert relative(torch.cat(steps, 1), logits(expected, rows)) <= 1e-5


@pytest.mark.parametrize("name", NO_HEAD_DIM)
def test_a_layer_without_heads_adds_the_bias_of_its_output_projection(name):
    narrow = compact.remove_heads(gated(name, FIRST_LAYER))
    bias = attention_by_hand(build(name), name, 0).get_submodule(
        {"gpt2": "c_proj", "opt": "out_proj", "gpt_neox": "dense"}[name]
    ).bias  # fmt: skip
    added, _ = attention_by_hand(narrow, name, 0)(hidden_states=torch.randn(2, 3, HIDDEN))
    assert torch.equal(added, bias.expand(2, 3, HIDDEN)) and bias.abs().min() > 0


def test_in_training_the_bias_of_a_layer_without_heads_still_meets_its_dropout():
    layer = attention_by_hand(compact.remove_heads(gated("gpt2", FIRST_LAYER)), "gpt2", 0).train()
    dropped = (layer(torch.randn(8, 16, HIDDEN))[0] == 0).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.05)


def test_the_heads_of_a_layer_are_those_that_were_open_and_no_gate_is_left():
    model = gated("gpt2", [(0, 1), (0, 3), (1, 0)])
    narrow = compact.remove_heads(model)
    old, new = (attention_by_hand(m, "gpt2", 0) for m in (model, narrow))
    rows = [*range(8), *range(16, 24)]  # heads 0 and 2, eight numbers each
    expected = torch.cat([old.c_attn.weight[:, block * HIDDEN :][:, rows] for block in range(3)], dim=1)
    assert torch.equal(new.c_attn.weight, expected) and torch.equal(new.c_proj.weight, old.c_proj.weight[rows])
    assert attention.closed_heads(narrow) == []
    assert compact.removal(narrow).kept == ((0, 2), (1, 2, 3)) and compact.removal(model) is None


def test_the_given_model_stays_as_it_was_and_only_narrowed_tensors_are_new():
    model = gated("llama", EVEN)
    before, state = models.fingerprint(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    narrow = compact.remove_heads(model)
    assert models.fingerprint(model) == before and attention.closed_heads(model) == EVEN
    assert model.config.num_attention_heads == 4 and narrow.config.num_attention_heads == 2
    new = {name for name, p in narrow.named_parameters() if p.data_ptr() != state[name]}
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert new == {f"model.layers.{layer}.self_attn.{kind}.weight" for layer in range(3) for kind in kinds}


def test_with_no_head_closed_nothing_is_removed():
    narrow = compact.remove_heads(gated("gpt2", []))
    assert torch.equal(logits(narrow, ids()), logits(build("gpt2"), ids()))
    assert compact.removal(narrow).loads_with == "plain transformers"


# ------------------------------------------------------------------------------------------------------------ smaller

# parameters of two heads that share a key/value head (of two heads where none is shared), head_dim 8, hidden size 32
PLAIN_HEADS = 2 * (3 * 8 * (32 + 1) + 8 * 32)
PENCIL = {
    **dict.fromkeys(NO_HEAD_DIM, PLAIN_HEADS),  # q, k, v rows with their biases, output columns
    **dict.fromkeys(["llama", "mistral", "mistral_window", "mixtral", "phi3"], 3 * 2 * 8 * 32),
    "qwen2": 3 * 2 * 8 * 32 + 2 * 8 + 8 + 8,  # biases of q, k and v
    "qwen3": 3 * 2 * 16 * 32,  # head_dim 16
}


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_and_bytes_that_go_are_those_of_a_pencil(name, tokenizer, tmp_path):
    model = gated(name, GROUP)
    narrow = compact.remove_heads(model)
    assert models.parameters(model) - models.parameters(narrow) == PENCIL[name]
    size = models.stored_bytes(models.save_model(narrow, tokenizer, tmp_path / "narrow"))
    assert size == models.weight_bytes(narrow) == models.weight_bytes(model) - 4 * PENCIL[name]
    assert models.stored_bytes(models.save_model(model, tokenizer, tmp_path / "gated")) == models.weight_bytes(model)
    file = (tmp_path / "narrow" / "model.safetensors").stat().st_size
    assert size < file < (tmp_path / "gated" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_head_whose_group_stays_takes_its_query_and_output_alone(name):
    model = gated(name, ONE_OF_EACH_GROUP)
    narrow = compact.remove_heads(model)
    assert models.parameters(model) - models.parameters(narrow) == 2 * (8 * 32 + 8 * 32)


# ---------------------------------------------------------------------------------------------------- save and load


def loads_with(name: str, closed) -> str:
    if name not in NO_HEAD_DIM and closed == EVEN:
        return "plain transformers"
    return "nbhelpers"


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_compact_model_loads_again_and_in_plain_transformers_where_that_is_said(name, tokenizer, tmp_path):
    rows = ids()
    for number, closed in enumerate([EVEN, CLOSINGS["a first layer"]]):
        narrow = compact.remove_heads(gated(name, closed))
        folder = models.save_model(narrow, tokenizer, tmp_path / str(number))
        again = models.load_model(str(folder), device="cpu").model
        assert models.fingerprint(again) == models.fingerprint(narrow)
        assert torch.equal(logits(again, rows), logits(narrow, rows))
        assert torch.equal(written(again, rows[:, :6]), written(narrow, rows[:, :6]))
        assert compact.removal(again) == compact.removal(narrow) and not again.training
        assert type(again) is type(build(name))
        assert compact.removal(narrow).loads_with == loads_with(name, closed)
        if loads_with(name, closed) == "plain transformers":
            plain = AutoModelForCausalLM.from_pretrained(folder)
            assert relative(logits(plain, rows), logits(oracle(name, closed), rows)) <= 1e-5
            assert torch.equal(written(plain, rows[:, :6]), written(narrow, rows[:, :6]))
        else:
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                AutoModelForCausalLM.from_pretrained(folder)


def test_a_llama_whose_heads_do_not_divide_the_hidden_size_loads_here_alone(tokenizer, tmp_path):
    model = build("llama", num_key_value_heads=4)
    attention.install(model)
    attention.close_heads(model, [(0, 1), (1, 2), (2, 3)])
    narrow = compact.remove_heads(model)
    assert compact.removal(narrow).loads_with == "nbhelpers" and narrow.config.num_attention_heads == 4
    again = models.load_model(str(models.save_model(narrow, tokenizer, tmp_path / "model")), device="cpu").model
    assert relative(logits(again, ids()), logits(model, ids())) <= 1e-5


def test_a_plain_compact_model_is_pruned_and_reduced_further_like_any_other(tokenizer, tmp_path):
    first = models.save_model(compact.remove_heads(gated("qwen3", EVEN)), tokenizer, tmp_path / "first")
    model = models.load_model(str(first), device="cpu").model
    models.check_prunable(str(first))
    attention.close_heads(model, [(1, 0)])
    expected = oracle("qwen3", [*EVEN, (1, 0)])  # the first of the two that the second layer kept
    gated_again = models.load_model(str(models.save_model(model, tokenizer, tmp_path / "second")), device="cpu").model
    assert attention.closed_heads(gated_again) == [(1, 0)]
    attention.close_heads(model, [(0, 0), (1, 1)])
    last = compact.remove_heads(model)
    assert relative(logits(gated_again, ids()), logits(expected, ids())) <= 1e-5
    assert relative(logits(last, ids()), logits(oracle("qwen3", [*EVEN, (0, 2), (1, 1)]), ids())) <= 1e-5
    saved = models.save_model(last, tokenizer, tmp_path / "third")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(saved), ids()), logits(last, ids())) <= 1e-6


def test_a_compact_model_can_be_trained_and_takes_part_in_what_looks_at_models():
    narrow = compact.remove_heads(gated("gpt2", [*FIRST_LAYER, (1, 1)]))
    loss = narrow(input_ids=ids(), labels=ids()).loss
    loss.backward()
    weights = attention_by_hand(narrow, "gpt2", 1).c_attn.weight
    assert weights.grad.shape == (HIDDEN, 3 * 24) and weights.grad.abs().max() > 0
    assert math.isfinite(evaluate.perplexity(narrow, ROWS).nll)


RECORD_FAULTS = [
    ({"format": 2}, "has format 2, expected 1"),
    ({"extra": 1}, "lacks or should not have 'extra'"),
    ({"heads": "4"}, "needs a count 'heads', got '4'"),
    ({"kv_heads": 3}, "has 4 heads, no multiple of its 3 key/value heads"),
    ({"heads": 8}, r"is for 8 heads \(2 key/value heads\) of 8, the model's config says 4 \(2\) of 8"),
    ({"loads_with": "magic"}, "needs 'loads_with' to be 'plain transformers' or 'nbhelpers', got 'magic'"),
    ({"loads_with": "plain transformers"}, "does not keep the 4 heads in every layer that the model's config says"),
    ({"kept": [[0, 1, 2, 3]]}, "needs 'kept' to list the heads of 3 layers"),
    ({"kept": [[0, 1, 2, 3], [2, 4], [0]]}, r"needs numbers in \[0, 4\) as kept heads of layer 1, got \[2, 4\]"),
    ({"kept": [[0, 1, 2, 3], [3, 2], [0]]}, r"needs the kept heads of layer 1 in order and once each, got \[3, 2\]"),
    ({"kept": [[0, 1, 2, 3], [0, 1, 2], [0]]}, "is for no model .*in layer 1 KV group 1 keeps 1 of 2"),
]


@pytest.mark.parametrize("values, message", RECORD_FAULTS)
def test_a_record_that_is_damaged_or_of_another_model_is_refused_in_one_line(values, message, tokenizer, tmp_path):
    folder = models.save_model(compact.remove_heads(gated("llama", GROUP)), tokenizer, tmp_path / "model")
    record = folder / "compact_heads.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | values))
    with pytest.raises(ValueError, match=f"compact_heads.json' {message}.*; copy the model again") as caught:
        models.load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_other_kept_heads_than_the_weights_have_and_a_lost_record_are_refused(tokenizer, tmp_path):
    folder = models.save_model(compact.remove_heads(gated("llama", GROUP)), tokenizer, tmp_path / "model")
    record = folder / "compact_heads.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"kept": [[0, 1], [2, 3], [0, 1, 2, 3]]}))
    with pytest.raises(ValueError, match="lacks weights .* or has them in another shape: .*layers.0.self_attn"):
        models.load_model(str(folder), device="cpu")
    record.unlink()
    with pytest.raises(ValueError, match="lacks weights .* or has them in another shape: .*layers.1.self_attn"):
        models.load_model(str(folder), device="cpu")


# ---------------------------------------------------------------------------------------------------------- refusals


def test_heads_that_leave_kv_groups_of_different_sizes_are_refused_by_layer_and_group():
    geo = Geometry(layers=2, heads=6, kv_heads=3, head_dim=8)
    assert compact.kept_heads(geo, [(1, 0), (1, 1), (1, 3), (1, 5)]) == ((0, 1, 2, 3, 4, 5), (2, 4))
    with pytest.raises(
        ValueError, match=r"in layer 1 KV group 1 keeps 1 of 2 heads and another keeps 2; .*--kv-groups"
    ):
        compact.kept_heads(geo, [(1, 0), (1, 1), (1, 2)])
    with pytest.raises(ValueError, match="in layer 1 KV group 0 keeps 1 of 2"):
        compact.remove_heads(gated("mistral", [(1, 0)]))


def test_single_heads_that_share_keys_are_refused_before_anything_is_chosen():
    with pytest.raises(ValueError, match=r"remove needs whole KV groups, and here 4 heads share .*: add --kv-groups"):
        compact.check_whole_groups(Geometry(2, 8, 2, 8), kv_groups=False)
    compact.check_whole_groups(Geometry(2, 8, 2, 8), kv_groups=True)
    compact.check_whole_groups(Geometry(2, 8, 8, 8), kv_groups=False)


def test_an_adapter_that_is_not_merged_and_quantised_weights_are_refused():
    model = gated("llama", GROUP)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="v_proj carries an adapter; merge it before heads are removed"):
        compact.remove_heads(adapted)
    model = gated("gpt2", GROUP)
    layer = attention_by_hand(model, "gpt2", 1).c_attn
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="cannot be removed from quantised weights; load the model without"):
        compact.remove_heads(model)


@pytest.mark.parametrize("closed", [GROUP, FIRST_LAYER, EVEN], ids=["group", "layer", "even"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_model_with_other_heads_than_its_config_says_takes_no_gates_and_no_scores(name, closed):
    narrow = compact.remove_heads(gated(name, closed))
    attention.install(narrow)
    assert attention.closed_heads(narrow) == []
    says = r"layer \d has \d heads and its config says 4: heads were removed from this model; prune the model it was"
    for strategy in heads.STRATEGIES.names():
        with pytest.raises(ValueError, match=says):
            heads.STRATEGIES[strategy](narrow, ROWS)
    with pytest.raises(ValueError, match=says):
        heads.prune(narrow, ROWS, "magnitude", 0.5)
    with pytest.raises(ValueError, match=says):
        attention.close_heads(narrow, [(1, 0)])
    with pytest.raises(ValueError, match=says), attention.head_outputs(narrow):
        pass
    with pytest.raises(ValueError, match=says):
        compact.remove_heads(narrow)


def test_a_saved_model_with_other_heads_than_its_config_says_is_refused_before_its_weights_are_read(
    tokenizer, tmp_path
):
    folder = models.save_model(compact.remove_heads(gated("gpt2", GROUP)), tokenizer, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is a compact model .*cannot be pruned further; prune the model it was made"):
        models.check_prunable(str(folder))


# ------------------------------------------------------------------------------------------ facts, and their saboteurs


def removal_fact(name: str, closed) -> facts.Fact:
    model = gated(name, closed)
    return facts.removal_changed_nothing(model, compact.remove_heads(model), text_rows((24, 11)))


@pytest.mark.parametrize("name", NAMES)
def test_an_honest_removal_is_a_fact(name):
    fact = removal_fact(name, CLOSINGS["a first layer"])
    assert fact.ok and fact.values["tokens"] == 12 and fact.values["tokens_gap"] == 0, fact.line()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("closed", [GROUP, ONE_OF_EACH_GROUP], ids=["group", "one of each"])
def test_the_output_columns_of_other_heads_fail(name, closed, monkeypatch):
    honest = compact._keep_inputs
    monkeypatch.setattr(compact, "_keep_inputs", lambda layer, columns: honest(layer, columns.flip(0)))
    fact = removal_fact(name, closed)
    assert not fact.ok and fact.values["relative_difference"] > 1e-3
    assert fact.line().startswith("FAILED the model without the heads computes what it computed with them closed")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_query_rows_of_other_heads_fail(name, monkeypatch):
    honest = compact._projection_rows
    monkeypatch.setattr(
        compact, "_projection_rows", lambda arch, geo, kept, groups: honest(arch, geo, [h ^ 1 for h in kept], groups)
    )
    assert not removal_fact(name, ONE_OF_EACH_GROUP).ok


def test_neox_rows_cut_as_if_queries_came_first_fail(monkeypatch):
    honest = compact._projection_rows
    monkeypatch.setattr(
        compact, "_projection_rows", lambda arch, *rest: honest(arch._replace(layout="rows"), *rest)
    )  # valid shapes, other numbers
    assert not removal_fact("gpt_neox", GROUP).ok


@pytest.mark.parametrize("name", NO_HEAD_DIM)
def test_a_dropped_bias_of_a_layer_without_heads_fails(name, monkeypatch):
    class Silent(compact._Bias):
        def __init__(self, projection):
            super().__init__(projection)
            self.bias = None

    monkeypatch.setattr(compact, "_Bias", Silent)
    assert not removal_fact(name, FIRST_LAYER).ok


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_layer_without_heads_that_forgets_the_cache_writes_other_tokens_and_fails(name, monkeypatch):
    honest = compact.NoHeads.forward
    monkeypatch.setattr(compact.NoHeads, "forward", lambda self, hidden_states, **options: honest(self, hidden_states))
    fact = removal_fact(name, FIRST_LAYER)
    assert not fact.ok and fact.values["relative_difference"] <= 1e-5 and "differ from token" in fact.saw


def test_a_tie_between_two_tokens_is_no_difference_and_a_clear_choice_is(monkeypatch):
    model = gated("gpt2", GROUP)
    rows = text_rows((4,))
    for gap, ok in [(1e-6, True), (1e-3, False)]:
        steps = iter([torch.tensor([[1.0, 1.0 - gap], [0, 1]]), torch.tensor([[1.0 - gap, 1.0], [0, 1]])])
        monkeypatch.setattr(facts, "_greedy_steps", lambda *_rest, steps=steps: next(steps))
        fact = facts.removal_changed_nothing(model, model, rows)
        assert fact.ok is ok and ("but for a tie" in fact.saw) is ok


@pytest.mark.parametrize(
    "parameters, size, removed, ok",
    [
        ((10, 8), (40, 32), 1, True),
        ((10, 10), (40, 32), 1, False),
        ((10, 8), (40, 40), 1, False),
        ((10, 10), (40, 40), 0, True),
        ((10, 8), (40, 40), 0, False),
    ],
)
def test_parameters_and_bytes_must_both_fall(parameters, size, removed, ok):
    assert facts.removal_made_it_smaller(parameters, size, removed).ok is ok


@pytest.mark.parametrize("name, closed, asked", [("gpt2", GROUP, 1), ("llama", EVEN, 2)])
def test_plain_transformers_is_asked_where_it_can_load_the_model(name, closed, asked, tokenizer, tmp_path):
    narrow = compact.remove_heads(gated(name, closed))
    folder, nll = models.save_model(narrow, tokenizer, tmp_path / "model"), evaluate.perplexity(narrow, ROWS).nll
    options = {"removal": compact.removal(narrow)}
    found = facts.saved_model_is_the_same(folder, ROWS, nll, [], "cpu", **options)
    assert [fact.ok for fact in found] == [True] * asked and "removed heads equal" in found[0].saw


def test_a_loss_or_a_removal_other_than_the_saved_one_fails(tokenizer, tmp_path):
    narrow, other = (removed("gpt2", closed) for closed in (GROUP, FIRST_LAYER))
    folder, nll = models.save_model(narrow, tokenizer, tmp_path / "model"), evaluate.perplexity(narrow, ROWS).nll
    for said, loss in ((compact.removal(narrow), nll + 1e-3), (compact.removal(other), nll)):
        assert not facts._reloaded(folder, ROWS, loss, [], "cpu", said, None).ok


def test_speed_is_the_median_of_passes_in_turn(monkeypatch):
    model = build("gpt2")
    other = build("gpt2", seed=1)
    clock = iter([0, 9, 0, 9, 0, 1, 0, 2, 0, 2, 0, 1, 0, 50, 0, 2])  # nines do not count, fifty is not the median
    order = []
    for at, one in enumerate((model, other)):
        one.register_forward_pre_hook(lambda *_rest, at=at: order.append(at))
    monkeypatch.setattr(evaluate, "_now", lambda model: next(clock))
    assert evaluate.tokens_per_second([model, other], ROWS, passes=3) == [27.0, 13.5]
    assert order == [1, 0, 0, 1, 1, 0, 0, 1]


def test_speed_can_be_stopped():
    with pytest.raises(Interrupted, match="stopped in round 0 of 5 of measuring speed"):
        evaluate.tokens_per_second([build("gpt2")], ROWS, should_stop=lambda: True)


# ---------------------------------------------------------------------------------------------------------------- runs

QUICK = {"window": 32, "scoring_windows": 2, "evaluation_windows": 4, "batch_size": 2, "sample_tokens": 4}
QUICK |= {"device": "cpu", "strategy": "magnitude", "steps": 0, "control": False, "level": 0.5, "remove": True}


def run(model: Path, text: Path, out: Path, **changes) -> dict:
    return PruningExperiment.run(PruningConfig(model=str(model), text=str(text), **QUICK | changes), run_dir=out)


def failed(result: dict) -> set[str]:
    return {fact["name"] for fact in result["facts"] if not fact["ok"]}


def test_a_run_that_removes_heads_leaves_a_smaller_model_and_says_by_how_much(model_folders, text_file, tmp_path):
    result = run(model_folders["llama"], text_file, tmp_path / "run", kv_groups=True, min_heads_per_layer=2)
    assert result["all_facts_hold"], failed(result)
    assert {"removal_changed_nothing", "removal_made_it_smaller"} <= {fact["name"] for fact in result["facts"]}
    assert result["loads_with"] == "plain transformers"  # two of four heads in each of two layers
    assert result["parameters_before"] == result["parameters"]
    assert result["parameters_before"] - result["parameters_after"] == 2 * 3 * 2 * 8 * 32
    assert result["bytes_before"] - result["bytes_after"] == 4 * 2 * 3 * 2 * 8 * 32
    assert result["tokens_per_second_before"] > 0 and result["tokens_per_second_after"] > 0
    plain = AutoModelForCausalLM.from_pretrained(result["model_dir"])
    assert models.parameters(plain) == result["parameters_after"]


@pytest.mark.slow
def test_a_tuned_model_is_reduced_too_and_what_is_loaded_again_has_the_same_loss(model_folders, text_file, tmp_path):
    result = run(model_folders["gpt2"], text_file, tmp_path / "run", steps=2, method="lora")
    assert result["all_facts_hold"] and result["loads_with"] == "nbhelpers"
    names = [fact["name"] for fact in result["facts"]]
    assert "reloaded_model_is_the_same" in names and "plain_transformers_computes_the_same" not in names
    loaded = models.load_model(result["run_dir"], device="cpu")
    rows = data.rows(loaded.tokenizer, data.load_corpus(str(text_file)).test, 32)[:4]
    assert evaluate.perplexity(loaded.model, rows).nll == pytest.approx(result["fine_tuned"]["nll"], rel=1e-5)


def test_a_removal_of_the_wrong_columns_is_reported_by_the_run(model_folders, text_file, tmp_path, monkeypatch):
    honest = compact._keep_inputs
    monkeypatch.setattr(compact, "_keep_inputs", lambda layer, columns: honest(layer, columns.flip(0)))
    result = run(model_folders["gpt2"], text_file, tmp_path / "run")
    assert failed(result) == {"removal_changed_nothing", "reloaded_model_is_the_same"}


def test_a_removal_that_removes_nothing_is_reported_by_the_run(model_folders, text_file, tmp_path, monkeypatch):
    def careless(model):
        model.nbhelpers_removal = compact.Removal(4, 4, 8, ((0, 1, 2, 3),) * 2, "plain transformers")
        return model

    monkeypatch.setattr(compact, "remove_heads", careless)
    result = run(model_folders["gpt2"], text_file, tmp_path / "run")
    assert {"removal_made_it_smaller", "reloaded_model_is_the_same"} <= failed(result)


def test_single_heads_that_share_keys_leave_no_run_directory(model_folders, text_file, tmp_path):
    with pytest.raises(ValueError, match="remove needs whole KV groups"):
        run(model_folders["llama"], text_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_fact_of_a_removal_on_cuda_holds(dtype, model_folders, text_file, tmp_path):
    for kind, options in (("gpt2", {}), ("llama", {"kv_groups": True})):
        result = run(model_folders[kind], text_file, tmp_path / kind, device="cuda", dtype=dtype, **options)
        assert result["all_facts_hold"], failed(result)


def test_a_real_model_without_half_its_heads_writes_the_same_text_and_is_smaller(data_dir, tmp_path):
    model = data_dir / "models" / "stories260K-hf"
    result = run(
        model, data_dir / "tinystories.jsonl", tmp_path / "run", strategy="gradient", kv_groups=True, window=256
    )
    assert result["all_facts_hold"] and len(result["pruned_heads"]) == 20
    assert result["parameters_before"] - result["parameters_after"] == 10 * (2 * 2 * 8 * 64 + 2 * 8 * 64)
    whole = models.load_model(str(model), device="cpu")
    attention.close_heads(whole.model, result["pruned_heads"])
    narrow = models.load_model(result["run_dir"], device="cpu")
    for prompt in ("Once upon a time", "Lily and Tom went to the"):
        texts = {evaluate.generate(m.model, m.tokenizer, prompt, temperature=0) for m in (whole, narrow)}
        assert len(texts) == 1 and len(texts.pop()) > len(prompt) + 40
