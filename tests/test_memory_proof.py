"""Is memory given back between large models, and do the real shapes fit the cards they are meant for?

Weights are random: what a model takes in memory does not depend on what it has learnt.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from nbhelpers import catalogue, generation, memory, models
from nbhelpers.training import TrainingConfig, fine_tune

MB, GIB = 10**6, 2**30
LAYERS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
LARGE = {**LAYERS, "num_hidden_layers": 11, "max_position_embeddings": 512}
TOKENS, NEW_TOKENS = 1400, 32  # about a dialogue of the hub's data, and room for an answer


def save_random_model(folder: Path, config, dtype: torch.dtype) -> int:
    """Write a model of this shape file by file, a layer each, so that it never has to be held; its weights' bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.state_dict().items():
        if name not in tied:
            parts.setdefault(name.rpartition("layers.")[2].split(".")[0], {})[name] = parameter.shape
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, places, written = torch.Generator(device).manual_seed(0), {}, 0
    for number, shapes in enumerate(parts.values()):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: (
                torch.ones(shape, dtype=dtype)
                if "norm" in name
                else torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator).cpu()
            )
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        written += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    models.load_tokenizer("tiny-llama").save_pretrained(folder)
    return written


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> tuple[str, int]:
    """(folder, bytes of weights) of a model of at least 500 MB in float32."""
    folder = tmp_path_factory.mktemp("large") / "model"
    vocabulary = len(models.load_tokenizer("tiny-llama"))
    size = save_random_model(folder, LlamaConfig(**LARGE, vocab_size=vocabulary), torch.float32)
    assert size >= 500 * MB
    yield str(folder), size
    shutil.rmtree(folder)


# In a new interpreter: memory of this one has a history. A tiny model goes first: what the first load, the first
# training and the first text import and allocate for good is not the large model's.
ONE_AFTER_ANOTHER = """
import json, sys, tempfile
import torch
from nbhelpers import generation, memory, models, runtime, scoring
from nbhelpers.training import TrainingConfig, fine_tune

folder, count, tuned = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "tuned"
device = runtime.device()
kind = "cuda_bytes" if device == "cuda" else "resident_bytes"
rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(1, 65).view(2, 32)]
config = TrainingConfig(method="lora", steps=1, batch_size=2, precision="fp32")

def held():
    return memory.in_use(device)[kind]

def use(name):
    global last  # as in a notebook: a variable still points to the model when the next one is loaded
    before = held()
    with memory.loaded(lambda: models.load_model(name, device=device, dtype="float32")) as last:
        if tuned:
            with tempfile.TemporaryDirectory() as scratch:
                fine_tune(last.model, rows, rows, config, output_dir=scratch)
        texts = dict(generation.continuations(last.model, last.tokenizer, ["One day", "She"], max_new_tokens=3))
        asked = [scoring.question(last.tokenizer, "One day", [" she", " he"])]
        ranked = dict(scoring.loglikelihoods(last.model, asked))
        assert len(texts) == 2 and len(ranked[0]) == 2
        return held() - before

use("tiny-llama"), use("tiny-llama")
start, taken, left = held(), [], []
for _ in range(count):
    taken.append(use(folder))
    left.append(held() - start)
print(json.dumps({"kind": kind, "taken": taken, "left": left}))
"""


def one_after_another(folder: str, count: int, how: str) -> dict:
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, folder, str(count), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def say(capsys, line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("evaluated", 5), ("tuned", 2)])
def test_large_models_one_after_another_leave_less_than_2_percent_of_the_first_behind(large, how, count, capsys):
    folder, size = large
    seen = one_after_another(folder, count, how)
    first, left = seen["taken"][0], seen["left"]
    shown = ", ".join(f"{bytes_ / MB:.1f}" for bytes_ in left)
    say(capsys, f"{how}, {seen['kind']}: first {first / MB:.0f} MB, left after each {shown} MB of {size / MB:.0f} MB")
    assert len(left) == count
    assert all(taken >= size for taken in seen["taken"])  # each was really held, none twice
    assert all(taken < first + 0.9 * size for taken in seen["taken"])
    assert max(left) < 0.02 * first


# On a GPU, in the real shapes -----------------------------------------------------------------------------------------


def room_for(folder: Path, size: int) -> None:
    if shutil.disk_usage(folder).free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of disk for random weights")


def text_of(tokenizer, tokens: int) -> str:
    """A text of at least so many tokens, in the tokenizer's own words."""
    words = "the doctor asked and the patient said that it was a long day "
    text = words * (tokens // len(tokenizer(words)["input_ids"]) + 1)
    return text + words


def generate(folder: Path, *, device: str, tokens: int = TOKENS) -> dict:
    """Load in 4 bits, read one dialogue of `tokens` tokens and write an answer: seconds, tokens and peaks."""
    with memory.peak() as loading:
        loaded = models.load_model(str(folder), device=device, quantization="4bit")
    with memory.loaded(lambda: loaded):
        prompt = loaded.tokenizer.decode(loaded.tokenizer(text_of(loaded.tokenizer, tokens))["input_ids"][:tokens])
        read = len(loaded.tokenizer(prompt)["input_ids"])
        dict(generation.continuations(loaded.model, loaded.tokenizer, ["the"], max_new_tokens=2))  # what is made once
        seconds = {}
        with memory.peak() as mark:
            for new in (1, NEW_TOKENS):
                began = time.perf_counter()
                dict(generation.continuations(loaded.model, loaded.tokenizer, [prompt], max_new_tokens=new))
                seconds[new] = time.perf_counter() - began
        return {"loading": loading, "mark": mark, "read": read, "seconds": seconds}


def train(folder: Path, *, device: str, tokens: int, output: Path, steps: int = 6) -> dict:
    """LoRA on all linear layers, one row of `tokens` tokens a step, activations computed twice."""
    with memory.loaded(lambda: models.load_model(str(folder), device=device, dtype="bfloat16")) as loaded:
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(3, len(loaded.tokenizer), (steps, tokens), generator=draws)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        settings = {"method": "lora", "batch_size": 1, "gradient_checkpointing": True, "packing": False}
        settings |= {"eval_every": None, "keep_best": False, "lora_rank": 16, "lora_alpha": 32}
        with memory.peak() as mark:
            result = fine_tune(loaded.model, rows, None, TrainingConfig(steps=steps, **settings), output_dir=output)
        return {"mark": mark, "result": result}


@pytest.mark.gpu
@pytest.mark.slow
def test_8b_shaped_inference_in_4_bits_stays_within_6_gb(tmp_path, capsys, record_property):
    room_for(tmp_path, 18 * GIB)
    config = AutoConfig.for_model(**{**catalogue.entry("Llama-3.1-8B").config, "max_position_embeddings": 8192})
    size = save_random_model(tmp_path / "model", config, torch.bfloat16)
    assert size == 2 * 8_030_261_248
    seen = generate(tmp_path / "model", device="cuda")
    shutil.rmtree(tmp_path / "model")
    one, many = seen["seconds"][1], seen["seconds"][NEW_TOKENS]
    measured = {
        "peak_bytes": seen["mark"].cuda_peak,
        "loading_peak_bytes": seen["loading"].cuda_peak,
        "prompt_tokens_per_second": seen["read"] / one,
        "new_tokens_per_second": (NEW_TOKENS - 1) / (many - one) if many > one else None,
    }
    say(capsys, f"8B-shaped, 4-bit nf4, {torch.cuda.get_device_name()}: {json.dumps(measured)}")
    for name, value in measured.items():
        record_property(name, value)
    assert size / 4 < seen["mark"].cuda_peak < 6 * GIB


@pytest.mark.gpu
@pytest.mark.slow
def test_3b_shaped_lora_training_stays_within_10_gb(tmp_path, capsys, record_property):
    room_for(tmp_path, 8 * GIB)
    config = AutoConfig.for_model(**{**catalogue.entry("Llama-3.2-3B").config, "max_position_embeddings": 8192})
    size = save_random_model(tmp_path / "model", config, torch.bfloat16)
    assert size == 2 * 3_212_749_824
    seen = train(tmp_path / "model", device="cuda", tokens=2048, output=tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    result = seen["result"]
    measured = {"peak_bytes": seen["mark"].cuda_peak, "tokens_per_second": result.tokens_per_second}
    say(capsys, f"3B-shaped, LoRA rank 16, bfloat16, {torch.cuda.get_device_name()}: {json.dumps(measured)}")
    for name, value in measured.items():
        record_property(name, value)
    assert (result.status, result.steps, result.micro_batch_size) == ("finished", 6, 1)
    assert size < seen["mark"].cuda_peak < 10 * GIB


@pytest.mark.slow
def test_the_measurements_of_the_real_shapes_run_on_small_ones(tmp_path):
    vocabulary = len(models.load_tokenizer("tiny-llama"))
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    for tied in (True, False):
        shape = LlamaConfig(
            **small, num_hidden_layers=2, vocab_size=vocabulary, max_position_embeddings=128, tie_word_embeddings=tied
        )
        folder = tmp_path / f"tied-{tied}"
        size = save_random_model(folder, shape, torch.bfloat16)
        assert size == 2 * models.parameters(models.load_model(str(folder), device="cpu").model)
    pytest.importorskip("bitsandbytes")
    seen = generate(folder, device="cpu", tokens=40)
    assert seen["read"] >= 40 and set(seen["seconds"]) == {1, NEW_TOKENS}
    trained = train(folder, device="cpu", tokens=64, output=tmp_path / "out", steps=2)["result"]
    assert (trained.status, trained.steps, trained.label_tokens) == ("finished", 2, 2 * 63)
