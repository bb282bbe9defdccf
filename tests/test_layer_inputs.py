"""Is what a projection reads handed on whole, without padding, and are the hooks gone afterwards?"""

from __future__ import annotations

import pytest
import torch
from small_models import NAMES, build, text_rows
from transformers import GptOssConfig, GptOssForCausalLM

from nbhelpers import layer_inputs
from nbhelpers.projections import Projection, projections
from nbhelpers.tracking import Interrupted

ROWS = text_rows((16, 9, 12))
TOKENS = 16 + 9 + 12


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_every_projection_reads_every_token_once_and_experts_share_them_by_two(name):
    model, seen = build(name), {}
    covered = projections(model).covered
    found = layer_inputs.read(
        model, covered, ROWS, lambda key, x: seen.setdefault(key, []).append(tuple(x.shape)), batch_size=2
    )
    for one in covered:
        counts = [found[one.name, expert] for expert in range(layer_inputs.experts(one))]
        assert sum(counts) == TOKENS * (2 if len(counts) > 1 else 1)  # two experts a token
        shapes = [shape for expert in range(len(counts)) for shape in seen[one.name, expert]]
        assert {shape[1] for shape in shapes} == {layer_inputs.fan_in(one)}
        assert sum(shape[0] for shape in shapes) == sum(counts)


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral"])
def test_what_is_read_in_a_padded_batch_is_what_is_read_alone(name):
    model, covered = build(name), projections(build(name)).covered

    def read(size: int) -> dict:
        seen: dict = {}
        layer_inputs.read(model, covered, ROWS, lambda key, x: seen.setdefault(key, []).append(x), batch_size=size)
        return {key: torch.cat(parts) for key, parts in seen.items()}

    alone, together = read(1), read(3)
    for key, inputs in alone.items():
        torch.testing.assert_close(together[key], inputs, rtol=1e-4, atol=1e-5)


def test_hooks_and_mode_are_as_before_also_after_an_error():
    model = build("mixtral").train()
    covered = projections(model).covered

    def fail(key, inputs):
        assert hooks(model) and not model.training
        raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        layer_inputs.read(model, covered, ROWS, fail)
    assert not hooks(model) and model.training

    def stop():
        raise Interrupted("planned")

    with pytest.raises(Interrupted, match="planned"):
        layer_inputs.read(model, covered, ROWS, lambda key, inputs: None, step=stop)
    assert not hooks(model) and model.training


def test_nothing_that_is_read_carries_a_graph():
    model = build("llama")
    layer_inputs.read(model, projections(model).covered, ROWS, lambda key, x: pytest.fail("graph") if x.grad_fn else 0)


def test_a_projection_that_never_runs_is_named():
    model = build("llama")
    model.model.layers[1].extra = torch.nn.Linear(32, 32, bias=False)
    covered = projections(model).covered
    with pytest.raises(ValueError, match=r"model\.layers\.1\.extra\.weight read nothing while the model read the rows"):
        layer_inputs.read(model, covered, ROWS, lambda key, inputs: None)


def test_a_projection_that_reads_other_positions_is_named():
    model = build("llama")
    up = model.model.layers[0].mlp.up_proj
    twice = up.forward
    up.forward = lambda x: twice(x)[:, : x.shape[1]]
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: (up(torch.cat([given[0]] * 2, 1)), None)[1])
    one = Projection("model.layers.0.mlp.up_proj.weight", (48, 32), 1)
    with pytest.raises(ValueError, match=r"up_proj\.weight reads 96 positions of a batch of 48"):
        layer_inputs.read(model, [one], ROWS, lambda key, inputs: None)


def test_experts_whose_way_to_compute_is_not_known_are_named():
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    covered = projections(model, accept_low_coverage=True).covered
    assert any(len(one.shape) == 3 for one in covered)
    with pytest.raises(
        LookupError, match=r"how GptOssExperts \(model\.layers\.0\.mlp\.experts\) computes is not known"
    ):
        layer_inputs.read(model, covered, ROWS, lambda key, inputs: None)
    assert not hooks(model)


def test_steps_count_to_their_total_and_stop_where_asked_but_not_after_the_last():
    seen = []
    step = layer_inputs.watched_steps(2, seen.append, None)
    step()
    step()
    assert seen == [{"done": 1, "total": 2}, {"done": 2, "total": 2}]
    step = layer_inputs.watched_steps(2, None, lambda: True)
    with pytest.raises(Interrupted, match="stopped after 1 of 2 steps of scoring weights"):
        step()
    step()
