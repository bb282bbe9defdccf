"""Where are a model's heads? Checked against paths written by hand, naive slices and eager attention."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import NAMES, OUTPUT, WINDOW, attention_by_hand, build, ids
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from nbhelpers import architecture

EXPECTED = {  # layers, heads, kv_heads, head_dim
    "gpt2": (2, 4, 4, 8),
    "opt": (2, 4, 4, 8),
    "gpt_neox": (2, 4, 4, 8),
    "llama": (3, 4, 2, 8),
    "qwen3": (2, 4, 2, 16),
}


@pytest.fixture(scope="session")
def bloom():
    return AutoModelForCausalLM.from_config(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("name", NAMES)
def test_head_counts_come_from_the_config(name):
    geo = architecture.geometry(build(name).config)
    assert (geo.layers, geo.heads, geo.kv_heads, geo.head_dim) == EXPECTED.get(name, (2, 4, 2, 8))
    assert geo.total == geo.layers * 4 and geo.group_size == 4 // geo.kv_heads


@pytest.mark.parametrize("name", NAMES)
def test_attention_modules_are_those_of_the_layers_in_order(name):
    model = build(name, num_hidden_layers=3)
    found = architecture.attention_modules(model)
    assert [id(module) for module in found] == [id(attention_by_hand(model, name, layer)) for layer in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_decoder_layers_are_the_modules_around_the_attention(name):
    model = build(name)
    layers = architecture.decoder_layers(model)
    assert isinstance(attention_by_hand(model, name, 1), nn.Module)
    assert all(
        any(part is attention_by_hand(model, name, at) for part in layer.children()) for at, layer in enumerate(layers)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_output_weight_is_a_view_with_the_heads_side_by_side_in_its_columns(name):
    model = build(name)
    geo, module = architecture.geometry(model.config), attention_by_hand(model, name, 1)
    stored = getattr(module, OUTPUT.get(name, "o_proj")).weight
    columns = architecture.output_weight(model, module)
    assert columns.shape == (32, geo.heads * geo.head_dim)
    assert columns.data_ptr() == stored.data_ptr(), "a view, not a copy"
    with torch.no_grad():
        columns[3, 5] = 77.0
    assert (stored[5, 3] if name == "gpt2" else stored[3, 5]) == 77.0


def test_only_the_projections_of_gpt2_are_stored_in_by_out():
    for name in NAMES:
        model = build(name)
        projection = architecture.output_projection(model, attention_by_hand(model, name, 0))
        assert architecture.is_transposed(projection) == (name == "gpt2"), name


def test_the_columns_of_head_2_of_width_8_are_16_to_24():
    assert architecture.head_columns(architecture.Geometry(1, 4, 4, 8), 2) == slice(16, 24)


@pytest.mark.parametrize("name", NAMES)
def test_zeroing_a_heads_query_rows_makes_that_head_attend_evenly_and_no_other(name):
    model, text = build(name, attention="eager"), ids()
    layer, head = 1, 2
    before = model(text, output_attentions=True).attentions
    weight, bias = architecture.query_rows(model, attention_by_hand(model, name, layer), head)
    with torch.no_grad():
        weight.zero_()
        if bias is not None:
            bias.zero_()
    after = model(text, output_attentions=True).attentions
    others = [at for at in range(4) if at != head]
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[layer][:, others], before[layer][:, others], rtol=0, atol=1e-6)
    length = text.shape[1]
    visible = torch.ones(length, length).tril()
    if name == "mistral_window":
        visible = visible.triu(1 - WINDOW)
    even = visible / visible.sum(1, keepdim=True)
    torch.testing.assert_close(after[layer][:, head], even.expand(2, -1, -1), rtol=0, atol=1e-6)
    assert (before[layer][:, head] - even).abs().max() > 0.1, "the head was not even to begin with"


def test_query_rows_are_absent_biases_where_the_projection_has_none():
    model = build("llama")
    weight, bias = architecture.query_rows(model, attention_by_hand(model, "llama", 0), 3)
    assert bias is None and weight.shape == (8, 32)
    assert torch.equal(weight, attention_by_hand(model, "llama", 0).q_proj.weight[24:32])


def test_an_unknown_architecture_is_named_beside_the_known_ones(bloom):
    assert not architecture.is_supported(bloom)
    with pytest.raises(
        LookupError, match=r"^unknown architecture for head pruning 'bloom'\..* Available: gpt2, opt, gpt_neox"
    ):
        architecture.attention_modules(bloom)


def test_layers_that_are_not_found_are_an_error_not_a_shorter_list():
    model = build("llama")
    model.config.num_hidden_layers = 4
    with pytest.raises(RuntimeError, match=r"found attention modules for layers \[0, 1, 2\], expected 0 to 3"):
        architecture.attention_modules(model)


@pytest.mark.parametrize("name, targets", [("llama", ["q_proj", "v_proj", "o_proj"]), ("gpt2", ["c_attn", "c_proj"])])
def test_inside_a_peft_wrapper_the_same_modules_and_base_weights_are_found(name, targets):
    model = build(name)
    modules = [attention_by_hand(model, name, layer) for layer in range(2)]
    weights = [architecture.output_weight(model, module) for module in modules]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2"))
    found = architecture.attention_modules(wrapped)[:2]
    assert all(one is other for one, other in zip(found, modules, strict=True))
    for module, weight in zip(found, weights, strict=True):
        assert architecture.output_weight(wrapped, module).data_ptr() == weight.data_ptr()
        assert architecture.is_transposed(architecture.output_projection(wrapped, module)) == (name == "gpt2")


class Packed(nn.Module):
    """A projection as bitsandbytes leaves it: integers, or floating-point storage with a quantisation state."""

    def __init__(self, dtype: torch.dtype, state: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 1, dtype=dtype), requires_grad=False)
        if state:
            self.weight.quant_state = object()


@pytest.mark.parametrize("dtype, state", [(torch.uint8, True), (torch.int8, False), (torch.bfloat16, True)])
def test_quantised_weights_are_refused_with_the_way_out(dtype, state):
    model = build("llama")
    module = attention_by_hand(model, "llama", 0)
    module.o_proj = Packed(dtype, state)
    with pytest.raises(ValueError, match="needs 16- or 32-bit weights, got a quantised model; load it without"):
        architecture.output_weight(model, module)
