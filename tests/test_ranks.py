"""Do several processes train what one trains, each with its share of the rows?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbhelpers import ranks
from nbhelpers.runs import read_run

SCRIPT = Path(__file__).parent / "rank_script.py"


def launched(processes: int, *command: str) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node N` of a script or `-m module`, on the CPU; one process: without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, *command], capture_output=True, text=True, timeout=900, env=environment)


def test_one_process_is_the_first_of_one_and_everything_stays_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (ranks.count(), ranks.number(), ranks.is_first()) == (1, 0, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.total([2.0, 3.0], "cpu") == [2.0, 3.0]
    assert ranks.any_of(True, "cpu") is True and ranks.told_by_first("x") == "x"


def test_the_shares_of_all_processes_are_the_rows_once_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for number in "012":
        monkeypatch.setenv("RANK", number)
        shares += ranks.share(list(range(8)))
        assert ranks.is_first() == (number == "0")
    assert sorted(shares) == list(range(8))


def test_a_bucket_has_one_number_format_and_a_bounded_size(monkeypatch):
    import torch

    monkeypatch.setattr(ranks, "BUCKET_BYTES", 16)
    sizes = [(2, torch.float32), (2, torch.float32), (1, torch.float32), (1, torch.float64), (9, torch.float64)]
    buckets = list(ranks._buckets([torch.zeros(count, dtype=kind) for count, kind in sizes]))
    assert [[len(tensor) for tensor in bucket] for bucket in buckets] == [[2, 2], [1], [1], [9]]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 1])
def test_two_processes_have_the_loss_curve_of_one_with_the_same_effective_batch(batch_size, tmp_path):
    """With one row a step the second process has none: it must take part all the same."""
    for processes in (1, 2):
        done = launched(processes, str(SCRIPT), str(tmp_path), str(batch_size))
        assert done.returncode == 0, done.stderr
    alone, *both = (
        json.loads((tmp_path / f"curve-{name}-{batch_size}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert alone["processes"] == 1 and all(found["processes"] == 2 for found in both)
    assert both[0]["losses"] == both[1]["losses"] and both[0]["weights"] == both[1]["weights"]
    assert both[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert both[0]["validation"] == pytest.approx(alone["validation"], abs=1e-5)
    assert both[0]["weights"] == pytest.approx(alone["weights"], rel=1e-6)
    assert both[0]["label_tokens"] == alone["label_tokens"]


@pytest.mark.slow
def test_the_command_under_torchrun_leaves_one_run_with_the_numbers_of_one_process(tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [" ".join(words[(n * k) % 10] for k in range(1, 60)) for n in range(30)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(texts)))
    command = ["-m", "nbhelpers", "finetune", "--model", "tiny-llama", "--data", str(data), "--method", "lora"]
    command += ["--steps", "4", "--window", "32", "--batch-size", "4", "--sample-tokens", "4", "--validations", "2"]
    command += ["--checkpoint-every", "2", "--control", "tiny-llama", "--evaluation-windows", "8", "--json"]
    results = []
    for processes in (1, 2):
        done = launched(processes, *command, "--out", str(tmp_path / f"of-{processes}"))
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.strip()]  # the first process alone reports
        results.append(json.loads(line))
    alone, together = results
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert together["fine_tuned"]["nll"] == pytest.approx(alone["fine_tuned"]["nll"], abs=1e-5)
    assert together["control"]["nll"] == pytest.approx(alone["control"]["nll"], abs=1e-5)
    run = read_run(tmp_path / "of-2")
    assert run.status == "finished" and len({(row["stage"], row["iteration"]) for row in run.metrics}) == len(
        run.metrics
    )
