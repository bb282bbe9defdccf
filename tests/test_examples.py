"""The examples run as they are, and print what their runs hold."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbhelpers import generated
from nbhelpers.runs import read_run

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_your_own_loop_needs_five_more_lines_and_the_table_says_what_the_runs_hold(tmp_path):
    source = (EXAMPLES / "track_your_own_loop.py").read_text(encoding="utf-8")
    assert re.findall(r"  # (\d)$", source, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    printed = run("track_your_own_loop.py", "--steps", 5, "--out", tmp_path / "runs", cwd=tmp_path)
    runs = {read.name: read for read in map(read_run, (tmp_path / "runs").iterdir())}
    assert set(runs) == {"sin lr=0.1", "sin lr=0.01", "sin lr=0.001"}
    for name, read in runs.items():
        steps, losses = read.curve("train_loss")
        assert (read.status, steps) == ("finished", [0, 1, 2, 3, 4])
        row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert row.split()[2:] == [
            "finished",
            "5",
            f"{losses[0]:.5f}",
            f"{losses[-1]:.5f}",
            f"{read.curve('val_loss')[1][0]:.5f}",
        ]
    best = min(runs.values(), key=lambda read: read.curve("val_loss")[1][0])
    assert f"best: learning rate {best.config['learning_rate']:g}\n" in printed


@pytest.mark.slow
def test_prune_then_generate_closes_half_of_the_heads_and_both_models_write(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    fast = ["--text", text, "--steps", 2, "--window", 32, "--evaluation-windows", 4, "--tokens", 4]
    printed = run("prune_then_generate.py", *fast, "--out", tmp_path / "run", cwd=tmp_path)
    result = read_run(tmp_path / "run").result
    closed, heads = len(result["pruned_heads"]), result["total_heads"]
    assert closed == heads // 2 and f"closed {closed} of {heads} heads by gradient\n" in printed
    for stage in ("baseline", "pruned", "fine_tuned"):
        assert re.search(rf"^{stage} +perplexity {result[stage]['perplexity']:.3f}$", printed, re.MULTILINE)
    assert re.search(r"^before +'The doctor said.+'$", printed, re.MULTILINE)
    assert re.search(r"^after +'The doctor said.+'$", printed, re.MULTILINE)
