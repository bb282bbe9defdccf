"""What a job will need is counted as by pencil, and agrees with what torch, peft and bitsandbytes hold."""

from __future__ import annotations

import json

import pytest
import torch

from nbhelpers import estimates, memory

TINY_GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 50}


def test_gpt2_is_counted_as_by_pencil_with_its_tied_head_once():
    block = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 4 * 8
    assert estimates.parameter_count(TINY_GPT2) == 50 * 8 + 16 * 8 + 2 * block + 2 * 8
    shape = estimates.shape_of(TINY_GPT2)
    assert shape.quantised == 2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    assert shape.adapter_width == 2 * (32 + 16 + 40 + 40)
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.key_value_width) == (2, 8, 50, 16)


def test_grouped_query_attention_leaves_less_in_the_cache():
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
        "tie_word_embeddings": False,
    }
    shape = estimates.shape_of(config)
    assert shape.key_value_width == 2 * 2 * 8
    assert shape.parameters - shape.quantised == 2 * 100 * 32 + 3 * 32  # embeddings, lm_head, norms


def test_counting_takes_a_transformers_config_and_needs_no_weights():
    from transformers import AutoConfig

    config = AutoConfig.for_model(**TINY_GPT2)
    assert estimates.parameter_count(config) == estimates.parameter_count(TINY_GPT2)
    with pytest.raises(ValueError, match=r"config must name its model_type, got the keys \['n_embd'\]"):
        estimates.parameter_count({"n_embd": 8})


def test_the_sum_of_sixteen_bit_inference_can_be_redone_with_a_pencil():
    shape = estimates.Shape(124_439_808, 84_934_656, 147_456, 12, 768, 50_257, 1_536)
    need = estimates.required_bytes(shape, "inference_16bit", tokens=100)
    activations = 100 * (2 * 12 * 1536 + 6 * 50_257)
    assert need.items["weights"] == 248_879_616
    assert need.items["activations"] == activations
    assert need.items["margin"] == round(0.1 * (248_879_616 + activations))
    assert need.total == sum(need.items.values())
    assert need.text == (
        "124.4 M parameters x 2 bytes = 249 MB weights + 34 MB activations + 28 MB margin (10%) = 311 MB"
    )


def test_full_fine_tuning_takes_what_adamw_really_holds():
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_GPT2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    optimizer.step()
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim),
    }
    need = estimates.required_bytes(TINY_GPT2, "full_finetuning")
    assert {name: need.items[name] for name in held} == held


def test_adapters_are_as_many_as_peft_makes():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_GPT2))
    tuned = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=True))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    need = estimates.required_bytes(TINY_GPT2, "lora", rank=3)
    assert need.items["optimizer"] == 8 * trained
    assert need.items["weights"] == 2 * estimates.parameter_count(TINY_GPT2) + 4 * trained


@pytest.mark.parametrize(
    "job, each", [("inference_8bit", estimates.INT8_BYTES), ("inference_4bit", estimates.NF4_BYTES)]
)
def test_bytes_of_a_quantised_weight_are_those_of_bitsandbytes(job, each):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if job == "inference_8bit":
        layer = bitsandbytes.nn.Linear8bitLt(512, 1024, bias=False, has_fp16_weights=False).to("cpu")
        held = layer.weight.nbytes
    else:
        layer = bitsandbytes.nn.Linear4bit(512, 1024, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
        state = layer.weight.quant_state
        held = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == pytest.approx(each * 512 * 1024, rel=1e-3)


def test_embeddings_and_head_stay_in_sixteen_bits_where_the_config_tells():
    shape = estimates.Shape(1_000, 600, 0, 1, 1, 1, 1)
    assert estimates.required_bytes(shape, "inference_8bit").items["weights"] == 600 + 400 * 2
    assert estimates.required_bytes(shape, "inference_8bit", weight_bytes=4).items["weights"] == 600 + 400 * 4
    assert estimates.required_bytes(1_000, "inference_8bit").items["weights"] == 1_000


def test_jobs_stand_in_the_order_of_their_appetite():
    shape = estimates.shape_of(TINY_GPT2 | {"n_embd": 512, "n_layer": 8, "n_head": 8})
    totals = {job: estimates.required_bytes(shape, job, tokens=8).total for job in estimates.JOBS}
    order = ["inference_4bit", "inference_8bit", "inference_16bit", "lora", "full_finetuning"]
    assert [totals[job] for job in order] == sorted(totals[job] for job in order)
    assert totals["inference_4bit"] < totals["qlora"] < totals["lora"]


def test_every_option_of_an_estimate_changes_it():
    base = estimates.required_bytes(TINY_GPT2, "qlora").total
    for option in ({"tokens": 513}, {"rank": 17}, {"weight_bytes": 4}):
        assert estimates.required_bytes(TINY_GPT2, "qlora", **option).total > base


def test_fits_is_a_comparison_with_the_free_bytes(monkeypatch):
    need = estimates.required_bytes(1_000_000, "full_finetuning")
    assert estimates.fits(need, free_bytes=need.total)
    assert not estimates.fits(need, free_bytes=need.total - 1)
    assert estimates.fits(1_000_000, "full_finetuning", free_bytes=need.total)
    monkeypatch.setattr(memory, "available_bytes", lambda: need.total - 1)
    assert not estimates.fits(1_000_000, "full_finetuning")
    with pytest.raises(ValueError, match="job must be given for a model, got None; one of inference_16bit"):
        estimates.fits(1_000_000)


def test_wrong_questions_are_refused_in_one_line():
    with pytest.raises(LookupError, match=r"unknown job 'qlorra'\. Did you mean 'qlora'\?"):
        estimates.required_bytes(1, "qlorra")
    with pytest.raises(ValueError, match="parameters must be at least 1, got 0"):
        estimates.required_bytes(0, "lora")
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        estimates.required_bytes(1, "lora", tokens=0)


@pytest.mark.parametrize(
    "size, text", [(0, "0 MB"), (248_879_616, "249 MB"), (999_600_000, "1.0 GB"), (16.06e9, "16.1 GB")]
)
def test_sizes_are_written_in_decimal_units(size, text):
    assert estimates.megabytes(size) == text


def test_a_shape_survives_being_stored():
    shape = estimates.shape_of(TINY_GPT2)
    assert estimates.Shape(**json.loads(json.dumps(estimates.shape_record(shape)))) == shape
