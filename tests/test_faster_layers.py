"""Do the faster layers compute what the model's own do, and only while they are asked for?"""

from __future__ import annotations

import pytest
import small_models
import torch

from nbhelpers import faster_layers, preparation
from nbhelpers.training import TrainingConfig

IDS = small_models.ids(3, 12)


def adapted(name: str, **settings) -> torch.nn.Module:
    """A model with adapters that are not zero."""
    model = small_models.build(name).requires_grad_(False)
    trained = preparation.with_adapters(model, TrainingConfig(method="lora", lora_rank=3, **settings))
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in trained.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) / 6)
    return trained.train()


def loss_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(input_ids=IDS).logits.logsumexp(-1).square().mean()
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "phi3"])
def test_output_and_every_gradient_are_those_of_pefts_layers(name):
    model = adapted(name).eval()
    expected, wanted = loss_and_gradients(model)
    with faster_layers.in_use(model, "fp32") as changed:
        assert changed >= 8
        found, got = loss_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


def test_the_layers_are_the_models_own_again_also_after_an_error():
    model = adapted("gpt2")
    seen = []

    def broken(_model, _inputs):
        seen.append(any("forward" in module.__dict__ for module in model.modules()))
        raise RuntimeError("in between")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="in between"), faster_layers.in_use(model, "fp32"):
        model(IDS)
    assert seen == [True]
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {}])
def test_adapters_with_dropout_and_other_precisions_keep_pefts_layers(settings):
    model = adapted("llama", **settings)
    with faster_layers.in_use(model, "fp32" if settings else "bf16") as changed:
        assert changed == 0


def test_gpt2s_activation_is_the_tanh_approximation():
    from transformers.activations import NewGELUActivation

    own, x = NewGELUActivation(), torch.linspace(-6, 6, 101, requires_grad=True)
    before = own(x)
    with faster_layers.in_use(own, "fp32") as changed:
        after = own(x)
    assert changed == 1
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
