"""Memory is measured and given back, and running out of it is recognised."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading

import pytest
import torch

from nbhelpers import memory

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
MB = 10**6


def in_fresh_process(code: str) -> dict:
    """Run code that prints one JSON object in a new interpreter: memory of this one has a history."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


MODEL = """
import gc, json, torch
torch.set_num_threads(1)
from nbhelpers import memory
rss = memory.resident_bytes
def model(layers=72):  # 72 x 1024 x 1024 float32 = 302 MB, every page written
    return torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers)])
model(1)(torch.ones(1, 1024)).sum().backward(); gc.collect()
"""


# Giving back ----------------------------------------------------------------------------------------------------------


def test_release_gives_300_mb_back_although_variables_still_point_to_the_model():
    seen = in_fresh_process(
        MODEL
        + """
before = rss()
m = model(); also = m; layer = m[3]; weights = list(m.parameters())
loaded = rss()
memory.release(m)
print(json.dumps({"before": before, "loaded": loaded, "after": rss(), "kept": len(weights)}))
"""
    )
    grown = seen["loaded"] - seen["before"]
    assert grown == pytest.approx(72 * 4 * 1024**2, rel=0.03)
    assert seen["after"] - seen["before"] < 0.03 * grown
    assert seen["kept"] == 72


def test_release_gives_gradients_and_optimizer_state_back_too():
    seen = in_fresh_process(
        MODEL
        + """
def step(m):
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
    m(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    return optimizer
step(model(1)); gc.collect()  # what the first step imports is not the model's
before = rss()
m = model(24); optimizer = step(m)
loaded = rss()
memory.release(m, optimizer)
print(json.dumps({"before": before, "loaded": loaded, "after": rss()}))
"""
    )
    grown = seen["loaded"] - seen["before"]
    assert grown > 0.95 * 24 * 16 * 1024**2  # weights, gradients, two moments: 16 bytes a parameter
    assert seen["after"] - seen["before"] < 0.05 * grown


def test_loading_one_after_another_never_holds_two_models_also_after_an_error():
    seen = in_fresh_process(
        MODEL
        + """
before, high = rss(), []
for attempt in range(4):
    try:
        with memory.loaded(lambda: model(36)) as m:
            high.append(rss() - before)
            if attempt % 2:
                raise KeyError("the error keeps a frame, and the frame the model")
    except KeyError as error:
        kept = error
print(json.dumps({"high": high, "left": rss() - before}))
"""
    )
    one = 36 * 4 * 1024**2
    assert max(seen["high"]) < 1.1 * one
    assert seen["left"] < 0.06 * one


def test_an_error_within_goes_through_and_the_model_is_released():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError, match="division"), memory.loaded(lambda: model):
        _ = 1 / 0
    assert model.weight.numel() == 0


def test_nothing_is_released_where_loading_failed():
    def load():
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"), memory.loaded(load):
        pytest.fail("the block ran")


def test_a_released_model_refuses_to_run_and_says_why():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    memory.release(model)
    memory.release(model)  # twice does nothing
    assert sum(t.numel() for t in [*model.parameters(), *model.buffers()]) == 0
    with pytest.raises(RuntimeError, match="Sequential was released and holds no weights any more; load it again"):
        model(torch.ones(1, 3))


def test_release_lets_go_of_gradients_that_no_optimizer_knows():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    weight = model.weight
    memory.release(model)
    assert weight.grad is None


def test_a_tensor_taken_out_before_stays_valid_after_release():
    model = torch.nn.Linear(3, 2)
    kept = model.state_dict()["weight"]
    expected = kept.clone()
    memory.release(model)
    assert torch.equal(kept, expected)


def test_release_takes_whatever_holds_a_module():
    class Loaded:
        def __init__(self):
            self.model = torch.nn.Linear(3, 2)

    holder, pair = Loaded(), (torch.nn.Linear(3, 2), "tokenizer")
    memory.release(holder, pair)
    assert holder.model.weight.numel() == pair[0].weight.numel() == 0


@pytest.mark.parametrize("nothing", [None, "gpt2", {}, (1, 2), []])
def test_release_of_something_that_holds_no_model_is_an_error(nothing):
    with pytest.raises(TypeError, match="release takes torch modules, optimizers or what holds a module"):
        memory.release(nothing)


def test_a_quantised_layer_gives_its_packed_weights_and_scales_back():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in (
        bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4"),
        bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False),
    ):
        layer.to("cpu")
        layer(torch.ones(1, 128))
        memory.release(layer)
        gc.collect()
        assert layer.weight.numel() == 0
        holders = [layer.weight, getattr(layer.weight, "quant_state", None), getattr(layer, "state", None)]
        left = [value for holder in holders if holder is not None for value in vars(holder).values()]
        assert not [value for value in left if isinstance(value, torch.Tensor)]


# Measuring ------------------------------------------------------------------------------------------------------------


def test_free_reports_ram_and_as_many_gpus_as_torch_sees():
    now = memory.free()
    assert 0 < now["ram_free"] <= now["ram_total"]
    assert len(now["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_freest_gpu_counts_where_there_is_one_and_ram_where_there_is_none(monkeypatch):
    gpus = [{"free": 5}, {"free": 9}]
    monkeypatch.setattr(memory, "free", lambda: {"ram_total": 100, "ram_free": 50, "gpus": gpus})
    assert memory.available_bytes() == 9
    gpus.clear()
    assert memory.available_bytes() == 50


def test_free_reads_every_gpu_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * (index + 1), 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: index)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    assert memory.free()["gpus"] == [
        {"name": "card 0", "total": 100, "free": 10, "allocated": 0},
        {"name": "card 1", "total": 100, "free": 20, "allocated": 1},
    ]


def test_peak_sees_what_a_block_held_and_gave_back():
    seen = in_fresh_process(
        MODEL
        + """
with memory.peak() as outer:
    with memory.peak() as inner:
        x = torch.ones(50_000_000); del x
    with memory.peak() as idle:
        pass
with memory.peak(interval_seconds=60) as unsampled:
    x = torch.ones(100_000_000); del x
threads = __import__("threading").active_count()
print(json.dumps([inner.resident_grown, outer.resident_grown, idle.resident_grown,
                  inner.resident_after - inner.resident_before, threads, unsampled.resident_grown]))
"""
    )
    inner, outer, idle, left, threads, unsampled = seen
    assert inner == pytest.approx(200 * MB, rel=0.03)
    assert outer == pytest.approx(200 * MB, rel=0.03)
    assert idle < 5 * MB
    assert left < 5 * MB
    assert threads == 1
    assert unsampled == pytest.approx(400 * MB, rel=0.03)  # a new high of the process needs no sample


def test_a_block_within_a_block_does_not_make_the_outer_one_forget_its_cuda_peak(monkeypatch):
    held = {"now": 0, "high": 0}

    def hold(size):
        held["now"] = size
        held["high"] = max(held["high"], size)

    counters = {
        "memory_allocated": lambda: held["now"],
        "max_memory_allocated": lambda: held["high"],
        "reset_peak_memory_stats": lambda: held.update(high=held["now"]) or 0,
    }
    monkeypatch.setattr(memory, "_cuda", lambda counter: counters[counter]())
    with memory.peak() as outer:
        hold(100)
        hold(10)
        with memory.peak() as inner:
            hold(30)
            hold(20)
    assert (outer.cuda_before, outer.cuda_peak, outer.cuda_after) == (0, 100, 20)
    assert (inner.cuda_before, inner.cuda_peak, inner.cuda_after) == (10, 30, 20)


def test_a_block_with_the_numbers_of_the_one_around_it_ends_and_not_that_one(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 7)
    monkeypatch.setattr(memory, "_cuda", lambda counter: 0)
    with memory.peak() as outer:
        with memory.peak():
            pass
        assert len(memory._open_marks) == 1 and memory._open_marks[0] is outer


def test_peak_ends_its_sampler_also_after_an_error():
    with pytest.raises(ValueError, match="inside"), memory.peak() as mark:
        raise ValueError("inside")
    assert mark.resident_after > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-peak"]
    assert memory._open_marks == []


# Out of memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.0 GB, max allowed: 6.0 GB)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_recognised(error):
    assert memory.is_oom(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("Storage size calculation overflowed"),
        ValueError("out of memory"),
        OSError("No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_out_of_memory(error):
    assert not memory.is_oom(error)


def test_the_cpu_allocators_own_refusal_is_recognised():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        torch.empty(1 << 50)
    assert memory.is_oom(caught.value)


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
def test_release_gives_cuda_memory_back_to_the_driver():
    before, driver_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    model = torch.nn.Linear(8192, 8192, bias=False, device="cuda")
    also = model.weight
    assert torch.cuda.memory_allocated() - before >= 8192 * 8192 * 4
    memory.release(model)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.mem_get_info()[0] >= driver_before - 64 * MB
    assert also.numel() == 0


@pytest.mark.gpu
@needs_cuda
def test_peak_measures_cuda_memory_also_of_a_block_within_a_block():
    torch.zeros(1, device="cuda")
    with memory.peak() as outer:
        big = torch.empty(100 * MB, dtype=torch.uint8, device="cuda")
        del big
        with memory.peak() as inner:
            small = torch.empty(10 * MB, dtype=torch.uint8, device="cuda")
            del small
    assert outer.cuda_peak - outer.cuda_before == pytest.approx(100 * MB, rel=0.03)
    assert inner.cuda_peak - inner.cuda_before == pytest.approx(10 * MB, rel=0.2)


@pytest.mark.gpu
@needs_cuda
def test_cuda_says_out_of_memory_in_a_way_that_is_recognised():
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    assert memory.is_oom(caught.value)
