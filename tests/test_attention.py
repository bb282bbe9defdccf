"""Does a closed gate remove a head, exactly that head, everywhere, and for good?"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from small_models import NAMES, VOCABULARY, WINDOW, attention_by_hand, build, ids, zero_by_hand
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from nbhelpers import attention, quantization

CLOSED = [(0, 1), (1, 0), (1, 3)]
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def gated(name: str, closed=(), **options) -> nn.Module:
    model = build(name, **options)
    attention.install(model)
    attention.close_heads(model, closed)
    return model


def padding(lengths: list[int], width: int, side: str) -> torch.Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[width - length :] = 1 if side == "left" else 0
        row[:length] = row[:length] if side == "left" else 1
    return mask


@torch.inference_mode()
def logits(model, text=None, **options):
    return model(ids() if text is None else text, **options).logits


# ----------------------------------------------------------------------------------------------------------- open gates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_open_gates_leave_the_logits_of_sdpa_bit_for_bit(name, padded):
    model, options = build(name), {"attention_mask": padding([16, 9], 16, "right")} if padded else {}
    stock = logits(model, **options)
    attention.install(model)
    assert torch.equal(logits(model, **options), stock)
    for module in attention.attention_modules(model):
        module.head_gate = torch.ones(4)  # a gate that is there, all open
    assert torch.equal(logits(model, **options), stock)


def test_installing_twice_keeps_the_gates():
    model = gated("llama", CLOSED)
    attention.install(model)
    assert attention.closed_heads(model) == CLOSED


def test_the_attention_function_and_the_gates_stay_out_of_saved_files(tmp_path):
    model = gated("llama", CLOSED)
    assert not any("head_gate" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


# --------------------------------------------------------------------------------------------------------- closed heads


@pytest.mark.parametrize("name", NAMES)
def test_closed_heads_compute_what_zeroed_projection_columns_compute(name):
    stock = build(name)
    whole = logits(stock)
    zero_by_hand(stock, name, CLOSED)
    model = gated(name, CLOSED)
    assert (logits(model) - whole).abs().max() > 1e-3, "closing changed the logits"
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_reaches_the_projection_is_exactly_zero_for_closed_heads_and_for_no_other(name):
    model = gated(name, CLOSED)
    with attention.head_outputs(model) as largest:
        logits(model)
    assert {tuple(head) for head in (largest == 0).nonzero().tolist()} == set(CLOSED)


def test_one_gpt2_layer_is_the_textbook_formula_with_the_heads_gated():
    model = gated("gpt2", [(0, 1), (0, 2)])
    module, x = attention_by_hand(model, "gpt2", 0), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        qkv = x @ module.c_attn.weight + module.c_attn.bias
        expected = module.c_proj.bias.expand(2, 7, 32).clone()
        for head in (0, 3):  # 1 and 2 are closed
            q, k, v = (qkv[..., part * 32 + head * 8 : part * 32 + head * 8 + 8] for part in range(3))
            scores = (q @ k.transpose(1, 2)) / math.sqrt(8)
            weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf).softmax(-1)
            expected += (weights @ v) @ module.c_proj.weight[head * 8 : head * 8 + 8]
        torch.testing.assert_close(module(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_lost_all_its_heads_still_adds_its_bias():
    model = gated("gpt2", [(1, head) for head in range(4)])
    module = attention_by_hand(model, "gpt2", 1)
    with torch.no_grad():
        out = module(torch.randn(1, 5, 32))[0]
    assert torch.equal(out, module.c_proj.bias.expand(1, 5, 32))


def test_close_heads_replaces_the_closed_heads_exactly():
    model = gated("llama", [(0, 0), (2, 3)])
    attention.close_heads(model, [[2, 1], (2, 1), (1, 2)])
    assert attention.closed_heads(model) == [(1, 2), (2, 1)]
    attention.close_heads(model, [])
    assert attention.closed_heads(model) == []
    assert torch.equal(logits(model), logits(build("llama")))


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0), (0, -1)])
def test_a_head_that_does_not_exist_is_named_and_nothing_is_closed(head):
    model = gated("llama", CLOSED)
    with pytest.raises(ValueError, match=rf"head \({head[0]}, {head[1]}\) does not exist: 3 layers with 4 heads each"):
        attention.close_heads(model, [(0, 0), head])
    assert attention.closed_heads(model) == CLOSED


def test_heads_are_closed_only_where_the_model_attends_through_gates():
    model = build("llama")
    assert attention.closed_heads(model) == [] and not attention.is_installed(model)
    with pytest.raises(RuntimeError, match=r"call attention.install\(model\) first"):
        attention.close_heads(model, [(0, 0)])


def test_half_precision_keeps_closed_heads_at_zero():
    model = gated("qwen2", CLOSED).to(torch.bfloat16)
    with attention.head_outputs(model) as largest:
        assert logits(model).dtype == torch.bfloat16
    assert (largest == 0).sum() == len(CLOSED)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", NAMES)
def test_closed_heads_stay_closed_in_generation_with_a_cache_also_in_plain_transformers(name):
    model, plain = gated(name, CLOSED), build(name, seed=1)
    plain.load_state_dict(attention.state_dict_without_closed_heads(model))
    prompt = ids(2, 7)
    ours = model.generate(prompt, use_cache=True, **GREEDY)
    assert torch.equal(ours, plain.generate(prompt, use_cache=True, **GREEDY))
    assert torch.equal(ours, model.generate(prompt, use_cache=False, **GREEDY))
    assert not torch.equal(ours, build(name).generate(prompt, **GREEDY)), "the pruned model writes something else"


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_weights_differ_in_the_closed_columns_alone_and_the_model_is_untouched(name):
    model, by_hand = gated(name, CLOSED), build(name)
    before = copy.deepcopy(model.state_dict())
    saved = attention.state_dict_without_closed_heads(model)
    zero_by_hand(by_hand, name, CLOSED)
    expected, after = by_hand.state_dict(), model.state_dict()
    assert saved.keys() == expected.keys()
    for key in before:
        assert torch.equal(saved[key], expected[key]), key
        assert torch.equal(after[key], before[key]), key


def test_an_adapter_that_is_not_merged_is_refused_by_name_when_closed_heads_are_saved():
    model = gated("llama", [(0, 1)])
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="self_attn.o_proj carries an adapter; merge it before saving closed heads"):
        attention.state_dict_without_closed_heads(wrapped)


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_writes_what_each_row_writes_alone(name):
    model, text = gated(name, CLOSED), ids(2, 9)
    mask = padding([9, 5], 9, "left")
    together = model.generate(text * mask, attention_mask=mask, **GREEDY)[:, 9:]
    for row, length in enumerate([9, 5]):
        alone = model.generate(text[row : row + 1, 9 - length :], **GREEDY)[:, length:]
        assert torch.equal(together[row : row + 1], alone), row


# ----------------------------------------------------------------------------------------------------------- gradients


def losses(model, text, mask=None) -> torch.Tensor:
    """Mean token nll of each row (rows,)."""
    out = model(text, attention_mask=mask, use_cache=False).logits[:, :-1]
    return F.cross_entropy(out.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


def in_float64(model: nn.Module) -> nn.Module:
    """All of it: RMS norms of transformers compute in float32 whatever the model's type, experts have no float64."""

    def norm(module):
        return lambda x: module.weight * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_gate_is_the_finite_difference_of_the_loss(name):
    model, text, step = in_float64(gated(name)), ids(1, 10), 1e-4
    with attention.differentiable_gates(model, 1) as gates:
        found = torch.stack([g[0] for g in torch.autograd.grad(losses(model, text).sum(), gates)])
    modules = attention.attention_modules(model)
    for layer, head in [(0, 0), (0, 3), (1, 2)]:
        values = []
        for sign in (1, -1):
            gate = torch.ones(4, dtype=torch.float64)
            gate[head] += sign * step
            modules[layer].head_gate = gate
            with torch.no_grad():
                values.append(losses(model, text).item())
        modules[layer].head_gate = None
        close = 1e-2 if name == "mixtral" else 1e-4  # its router is float32 for every type of the model
        assert found[layer, head].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=close, abs=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "mixtral"])
def test_gates_of_a_row_give_the_gradient_that_the_row_gives_alone(name):
    model, text = in_float64(gated(name, [(1, 1)])), ids(3, 12)
    with attention.differentiable_gates(model, 3) as gates:
        together = torch.autograd.grad(losses(model, text).sum(), gates)
    for row in range(3):
        with attention.differentiable_gates(model, 1) as gates:
            alone = torch.autograd.grad(losses(model, text[row : row + 1]).sum(), gates)
        for layer in range(2):
            torch.testing.assert_close(together[layer][row], alone[layer][0], rtol=1e-5, atol=1e-9)


def test_training_through_closed_gates_gives_their_columns_no_gradient():
    model = gated("llama", CLOSED).train()
    losses(model, ids()).sum().backward()
    gradient = attention_by_hand(model, "llama", 0).o_proj.weight.grad
    assert (gradient[:, 8:16] == 0).all() and (gradient[:, :8] != 0).any()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "phi3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_trains_the_same_with_closed_heads(name, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = gated(name, CLOSED, **NO_DROPOUT.get(name, {}))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses(model.train(), ids()).sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7)


def test_a_gate_closed_in_inference_mode_can_be_trained_through_afterwards():
    model = gated("llama")
    with torch.inference_mode():
        attention.close_heads(model, CLOSED)
    losses(model.train(), ids()).sum().backward()
    assert attention_by_hand(model, "llama", 0).q_proj.weight.grad is not None


# ----------------------------------------------------------------------------------------------------- all as it was


def test_heads_closed_adds_to_the_closed_heads_and_takes_them_back_after_an_error():
    model = gated("llama", [(1, 0)])
    inside = []

    def fail():
        with attention.heads_closed(model, [(0, 2)]):
            inside.append(attention.closed_heads(model))
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    assert inside == [[(0, 2), (1, 0)]]
    assert attention.closed_heads(model) == [(1, 0)]


def test_differentiable_gates_give_gates_and_gradients_of_parameters_back_after_an_error():
    model = gated("llama", [(1, 0)])
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    trainable = []

    def fail():
        with attention.differentiable_gates(model, 2) as gates:
            assert [tuple(gate.shape) for gate in gates] == [(2, 4)] * 3 and gates[1][:, 0].tolist() == [0.0, 0.0]
            trainable.extend(parameter for parameter in model.parameters() if parameter.requires_grad)
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    assert trainable == []
    assert attention.closed_heads(model) == [(1, 0)]
    gate = attention.attention_modules(model)[1].head_gate
    assert gate.shape == (4,) and not gate.requires_grad
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not frozen)


def test_meters_and_hooks_are_gone_after_an_error():
    model = gated("llama")
    for context in (attention.entropy_meter, attention.head_outputs, attention.reusable_layers):
        with pytest.raises(RuntimeError, match="planned"), context(model):
            raise RuntimeError("planned")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.attention_observer is None for module in attention.attention_modules(model))


@pytest.mark.parametrize("name", NAMES)
def test_reused_lower_layers_give_the_same_logits_bit_for_bit_and_are_let_go(name):
    model = gated(name)
    with attention.heads_closed(model, [(1, 2)]):
        expected = logits(model)
    with attention.reusable_layers(model) as reuse_below:
        logits(model)
        counted = []
        hook = attention_by_hand(model, name, 0).register_forward_hook(lambda *_: counted.append(1))
        with attention.heads_closed(model, [(1, 2)]), reuse_below(1):
            found = logits(model)
        hook.remove()
    assert torch.equal(found, expected) and not counted, "the first layer was not computed again"
    other = ids(seed=3)
    assert torch.equal(logits(model, other), logits(build(name), other))


# ------------------------------------------------------------------------------------------------------------- entropy


def naive_entropy(name: str, text: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """(layers, heads): from the whole attention matrices of eager attention, each text alone, query by query."""
    model = build(name, attention="eager")
    with torch.inference_mode():
        maps = [model(text[at : at + 1, :n], output_attentions=True).attentions for at, n in enumerate(lengths)]
    values = []
    for layer in range(len(maps[0])):
        for head in range(4):
            rows = []
            for at, length in enumerate(lengths):
                for query in range(1, length):
                    seen = min(query + 1, WINDOW) if name == "mistral_window" else query + 1
                    row = [p for p in maps[at][layer][0, head, query].tolist() if p > 0]
                    rows.append(-sum(p * math.log(p) for p in row) / math.log(seen))
            values.append(sum(rows) / len(rows))
    return torch.tensor(values, dtype=torch.float64).view(-1, 4)


def metered(model, text, mask=None) -> torch.Tensor:
    with attention.entropy_meter(model) as meter, torch.inference_mode():
        if mask is not None:
            meter.real_queries = mask.bool()
        model(text, attention_mask=mask, use_cache=False)
    return meter.mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[12, 12], [12, 7]], ids=["whole", "padded"])
def test_entropy_is_that_of_the_full_attention_matrix_row_by_row(name, lengths):
    text = ids(2, 12)
    mask = None if lengths == [12, 12] else padding(lengths, 12, "right")
    expected = naive_entropy(name, text, lengths)
    assert expected.min() < 0.9, "attention is not even"
    torch.testing.assert_close(metered(gated(name), text, mask), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_window"])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_of_queries_give_what_one_block_gives(name, padded, monkeypatch):
    model, text = gated(name), ids(2, 13)
    mask = padding([13, 8], 13, "right") if padded else None
    whole = metered(model, text, mask)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    torch.testing.assert_close(metered(model, text, mask), whole, rtol=0, atol=1e-6)


def observed(query, key, mask=None) -> attention.EntropyMeter:
    """A meter that saw one call with these queries and keys (batch, heads, length, head_dim)."""
    meter, module = attention.EntropyMeter(1, query.shape[1]), nn.Module()
    module.layer_idx = 0
    meter(module, query, key, mask, 1.0)
    return meter


def test_even_attention_has_entropy_1_and_one_token_alone_0():
    query, key = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)
    query[:, 1, :, 0] = 100.0
    key[:, 1, 0, 0] = 100.0  # head 1 looks at the first token, with all its weight
    assert observed(query, key).mean()[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_the_first_row_sees_one_token_and_is_not_counted():
    meter = observed(torch.zeros(3, 1, 6, 8), torch.zeros(3, 1, 6, 8))
    assert meter.rows.item() == 3 * 5


def test_a_pencil_row_of_one_half_and_one_half_of_three_visible_tokens():
    # only the last row counts: the mask lets the others see one token each. p = (1/2, 1/2, 0): log 2 / log 3
    query, key = torch.ones(1, 1, 3, 1), torch.tensor([0.0, 0.0, -200.0]).view(1, 1, 3, 1)
    mask = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool().view(1, 1, 3, 3)
    assert observed(query, key, mask).mean().item() == pytest.approx(math.log(2) / math.log(3), abs=1e-6)


def test_a_floating_point_mask_means_the_same_as_a_boolean_one():
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(2))
    visible = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert torch.equal(observed(query, key, visible).mean(), observed(query, key, additive).mean())


# ---------------------------------------------------------------------------------------------------- adapters, 4 bit


def test_gates_work_inside_a_peft_wrapper_in_training_and_after_merging():
    model = gated("llama", CLOSED)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    assert attention.is_installed(wrapped) and attention.closed_heads(wrapped) == CLOSED
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        losses(wrapped.train(), ids()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    with attention.head_outputs(wrapped) as largest:
        trained = logits(wrapped)
    assert (largest == 0).sum() == len(CLOSED) and attention.closed_heads(wrapped) == CLOSED
    with attention.differentiable_gates(wrapped, 2) as gates:
        assert torch.autograd.grad(losses(wrapped, ids()).sum(), gates)[0].abs().sum() > 0
    merged = wrapped.merge_and_unload()
    assert attention.closed_heads(merged) == CLOSED
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    plain = build("llama", seed=1)
    plain.load_state_dict(attention.state_dict_without_closed_heads(merged))
    torch.testing.assert_close(logits(plain), logits(merged), rtol=1e-5, atol=1e-5)


def test_four_bit_weights_attend_through_gates_and_are_refused_where_columns_would_be_zeroed(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    quantization.mend_4bit_on_cpu(model)
    attention.install(model)
    attention.close_heads(model, CLOSED)
    with attention.head_outputs(model) as largest:
        assert logits(model).shape[-1] == VOCABULARY
    assert (largest == 0).sum() == len(CLOSED)
    with pytest.raises(ValueError, match="quantised model with closed heads cannot be saved .*; dequantise it"):
        attention.state_dict_without_closed_heads(model)
