"""Is every projection of a model covered once, or named as left out with its share?"""

from __future__ import annotations

import pytest
import small_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from nbhelpers import adapters
from nbhelpers.projections import LEAST_COVERAGE, projections


def gpt_oss() -> nn.Module:
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )
    return AutoModelForCausalLM.from_config(config)


def of_layer(model: nn.Module, layer: int = 0) -> dict[str, tuple[tuple[int, ...], int]]:
    """name after the layer's number -> (stored shape, dimension of inputs)."""
    mark = f".{layer}."
    return {one.name.split(mark)[1]: (one.shape, one.inputs) for one in projections(model).covered if mark in one.name}


def test_all_matrices_of_a_llama_layer_are_covered_and_nothing_else():
    found = projections(small_models.build("llama"))
    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert [one.name for one in found.covered] == [
        f"model.layers.{at}.{name}.weight" for at in range(3) for name in names
    ]
    assert found.numbers == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # q, o; k, v of half the heads; MLP
    assert found.coverage == 1.0
    assert [(one.name, one.why, one.counts) for one in found.left_out] == [
        ("model.embed_tokens.weight", "embedding or output head", False),
        ("lm_head.weight", "embedding or output head", False),
    ]


def test_experts_in_three_dimensions_are_most_of_a_mixtral_and_covered():
    model = small_models.build("mixtral")
    found = projections(model)
    layer = of_layer(model)
    assert layer["mlp.experts.gate_up_proj"] == ((4, 2 * 48, 32), 2)
    assert layer["mlp.experts.down_proj"] == ((4, 32, 48), 2)
    experts = sum(one.numbers for one in found.covered if "experts" in one.name)
    linears = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert experts > 0.8 * found.numbers and linears < 0.2 * found.numbers, "what looks for Linear alone misses most"
    assert [one.why for one in found.left_out if "gate" in one.name] == ["router", "router"]


def test_fused_projections_of_phi3_are_covered():
    assert of_layer(small_models.build("phi3")) == {
        "self_attn.o_proj.weight": ((32, 32), 1),
        "self_attn.qkv_proj.weight": ((64, 32), 1),
        "mlp.gate_up_proj.weight": ((96, 32), 1),
        "mlp.down_proj.weight": ((32, 48), 1),
    }


def test_gpt2_keeps_its_matrices_the_other_way_round():
    model = small_models.build("gpt2")
    assert of_layer(model)["attn.c_attn.weight"] == ((32, 96), 0)
    one = projections(model).covered[0]
    weight = model.get_parameter(one.name)
    assert (one.inputs, one.outputs, one.module) == (0, 1, "transformer.h.0.attn.c_attn")
    assert one.as_matrix(weight).shape == (96, 32) and one.as_matrix(weight).data_ptr() == weight.data_ptr()


def test_experts_of_gpt_oss_lie_the_other_way_round_and_biases_are_no_projections():
    model = gpt_oss()
    layer = of_layer(model)
    assert layer["mlp.experts.gate_up_proj"] == ((4, 32, 96), 1) and layer["mlp.experts.down_proj"] == ((4, 48, 32), 1)
    one = next(one for one in projections(model).covered if one.name.endswith("gate_up_proj"))
    assert one.as_matrix(model.get_parameter(one.name)).shape == (4, 96, 32)
    why = {found.name.split("experts.")[-1]: found.why for found in projections(model).left_out}
    assert why["gate_up_proj_bias"] == why["down_proj_bias"] == "bias"


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_the_matrix_view_is_what_the_module_computes(name):
    model = small_models.build(name)
    one = next(one for one in projections(model).covered if name == "gpt2" or "down_proj" in one.name)
    x = torch.randn(5, one.shape[one.inputs])
    matrix = one.as_matrix(model.get_parameter(one.name))
    if name == "gpt2":
        module = model.get_submodule(one.module)
        assert torch.allclose(module(x), x @ matrix.T + module.bias, atol=1e-5)
    else:
        assert torch.equal(nn.functional.linear(x, model.get_parameter(one.name)[2]), x @ matrix[2].T)


def test_tied_weights_are_counted_once_under_their_first_name():
    model = small_models.build("llama", tie_word_embeddings=True)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    found = projections(model)
    names = [one.name for one in found.covered]
    assert names.count("model.layers.0.mlp.up_proj.weight") == 1 and "model.layers.1.mlp.up_proj.weight" not in names
    assert found.numbers == projections(small_models.build("llama")).numbers - 32 * 48
    assert [one.name for one in found.left_out] == ["model.embed_tokens.weight"]


class Strange(nn.Module):
    """A matrix that nobody knows how to use."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


def test_low_coverage_is_an_error_that_names_what_is_missed_unless_it_is_accepted():
    model = small_models.build("llama")
    numbers = projections(model).numbers
    model.model.layers[0].strange = Strange(numbers // 32, 32)  # as many again
    with pytest.raises(
        ValueError, match="only 50.0% of .* left out: model.layers.0.strange.weight .*accept_low_coverage"
    ):
        projections(model)
    found = projections(model, accept_low_coverage=True)
    assert found.numbers == numbers and found.coverage == pytest.approx(0.5, abs=1e-3)
    assert any("strange.weight" in line and "%" in line for line in found.lines())


def test_a_coverage_of_just_the_least_is_enough():
    model = small_models.build("llama")
    numbers = projections(model).numbers
    model.model.layers[0].strange = Strange(1, numbers // 9)
    assert projections(model).coverage == pytest.approx(LEAST_COVERAGE, abs=1e-3)


def test_shares_of_what_is_covered_and_left_out_add_up_to_all():
    lines = projections(small_models.build("mixtral")).lines()
    shares = [float(line.split("(")[-1].split("%")[0]) if "covered" in line else None for line in lines]
    rest = [float(line.split("(")[1].split("%")[0]) for line in lines[1:]]
    assert shares[0] + sum(rest) == pytest.approx(100, abs=0.3)


def test_quantised_weights_are_refused_by_name():
    model = small_models.build("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight is quantised.*without quantization"):
        projections(model)


def test_adapters_that_are_not_merged_are_refused():
    from peft import LoraConfig, get_peft_model

    with adapters.quiet_peft():
        model = get_peft_model(small_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters that are not merged: merge them or take them out"):
        projections(model.base_model.model)


def test_a_model_without_projections_is_refused():
    model = small_models.build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no projection that can be masked: left out: model.embed"
    ):
        projections(model)
