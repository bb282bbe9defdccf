"""Is the loss that of the model's own logits, with its gradients, and is there never a whole tensor of logits?"""

from __future__ import annotations

import pytest
import small_models
import torch
import torch.nn.functional as F

from nbhelpers import data, losses


def batch(kind: str = "plain") -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 7 tokens; the labels of `completion` are the last three tokens of each."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (9, 6, 7):
        ids = torch.randint(0, small_models.VOCABULARY, (length,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids if kind == "plain" else data.mask_prompt(ids, length - 3)})
    return data.collate(rows)


def own(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' logits and torch's cross-entropy, the textbook way."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=data.IGNORED, reduction="sum")


@pytest.mark.parametrize("labels", ["plain", "completion"])
@pytest.mark.parametrize("name", small_models.NAMES)
def test_loss_and_every_gradient_are_those_of_the_models_own_logits(name, labels, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 4 * small_models.VOCABULARY * 4})  # four tokens a chunk
    model, rows = small_models.build(name), batch(labels)
    expected = own(model, rows)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    found = losses.nll_sum(model, rows)
    got = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    assert losses.has_plain_head(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_row_sums_are_those_of_each_row_alone():
    model, rows = small_models.build("llama"), batch("completion")
    sums, tokens = losses.row_nlls(model, rows)
    assert tokens.tolist() == [3, 3, 3] and sums.dtype == torch.float64
    for at in range(3):
        alone = {name: tensor[at : at + 1] for name, tensor in rows.items()}
        assert sums[at].item() == pytest.approx(own(model, alone).item(), rel=1e-5)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 4 * small_models.VOCABULARY * 2})
    model, rows, seen = small_models.build("gpt2"), batch(), []
    linear = F.linear

    def spy(hidden, weight, bias=None):
        out = linear(hidden, weight, bias)
        if weight.shape[0] == small_models.VOCABULARY:
            seen.append(out.shape[0])
        return out

    monkeypatch.setattr(losses.F, "linear", spy)
    losses.nll_sum(model, rows).backward()
    losses.row_nlls(model, rows)
    assert max(seen) == 2 and sum(seen) == 2 * (8 + 5 + 6)


def test_the_head_is_as_before_also_after_an_error():
    model, rows = small_models.build("llama"), batch()
    before = model(input_ids=rows["input_ids"]).logits

    def broken(_model, _inputs):
        raise RuntimeError("stopped here")

    hook = model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="stopped here"):
        losses.nll_sum(model, rows)
    hook.remove()
    torch.testing.assert_close(model(input_ids=rows["input_ids"]).logits, before, rtol=0, atol=0)


def test_logits_that_are_changed_after_the_head_are_taken_from_the_model_itself():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=small_models.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model, rows = Gemma2ForCausalLM(config).eval(), batch()
    assert not losses.has_plain_head(model)
    torch.testing.assert_close(losses.nll_sum(model, rows), own(model, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", ["logits_soft_cap", "final_logit_softcapping", "output_logit_soft_cap"])
def test_any_soft_cap_of_logits_is_known_by_its_name(field):
    model = small_models.build("llama")
    assert losses.has_plain_head(model)
    setattr(model.config, field, 30.0)
    assert not losses.has_plain_head(model)
