"""A job kind that is done at once, for tests of plans, ledgers and sweeps: in this process and in ones of their own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from nbhelpers.grid import KINDS, JobKind
from nbhelpers.records import append_line, read_lines
from nbhelpers.runs import read_run
from nbhelpers.tracking import Diverged, ExperimentConfig, ExperimentTracker, Interrupted

TESTS = Path(__file__).parent
HELD = [""]  # the `model` that this process holds
CLOCK = [0.0]  # the `cost` of every job done in this process


class FakeConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = "fake"
    a: int = Field(0, ge=0, le=100)
    b: float = Field(0.0, ge=0, le=1)
    what: str = "fine"
    cost: float = 1.0
    log: str | None = None
    seed: int = 0
    batch_size: int = 8
    micro_batch_size: int | None = None  # with "oom above N" more than N rows at once do not fit
    model: str = "m"  # what jobs share: loaded where another one is held, and then written into `loads`
    loads: str | None = None
    steps: int = 0  # reports (step, a + b / step) on the way


def run_fake(config: FakeConfig, *, run_dir: Path, progress=None, should_stop=None) -> dict:
    if config.what == "refused":
        raise ValueError("a must be odd, got 2")
    fate = os.environ.get("FAKE_FATE", "").partition(" ")  # "3 middle": what happens in the third job of a process
    CLOCK.append(config.cost)
    at = fate[2] if fate[0] == str(len(CLOCK) - 1) else ""
    if at == "before":
        run_dir.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    record = ExperimentConfig(kind="fake", **config.model_dump())
    with ExperimentTracker(record, run_dir=run_dir, environment={}, command=["test"]) as tracker:
        tracker.log_metrics(train_loss=1.0)
        if at == "middle":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.log:
            time.sleep(config.cost)
        if config.loads and HELD[0] != config.model:
            HELD[0] = config.model
            append_line(config.loads, {"model": config.model, "pid": os.getpid()})
        if progress is not None:
            progress({"stage": "adding"})
        if should_stop is not None and should_stop():
            raise Interrupted("stopped while adding")
        _raise(config.what)
        if config.what.startswith("oom above") and (config.micro_batch_size or config.batch_size) > int(
            config.what[9:]
        ):
            _raise("oom")
        for step in range(1, config.steps + 1):
            tracker.log_metrics(step, stage="fake", val_loss=config.a + config.b / step)
            if progress is not None:
                progress({"stage": "fake", "step": step, "loss": config.a + config.b / step})
        total = float("nan") if config.what == "nan" else config.a + config.b
        if config.log:
            row = {"a": config.a, "b": config.b, "seed": config.seed, "pid": os.getpid()}
            append_line(config.log, row | {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")})
        tracker.finish({"total": total})
    if at == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"total": total}


def _raise(what: str) -> None:
    if what == "oom":
        import torch

        raise torch.OutOfMemoryError("tried to allocate 20 GiB")
    errors = {
        "diverge": Diverged("the loss is not finite"),
        "bad": LookupError("unknown text 'x'"),
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "bug": ZeroDivisionError("division by zero"),
        "interrupt": KeyboardInterrupt(),
    }
    if what == "kill":  # as the system does where memory ends
        os.kill(os.getpid(), signal.SIGKILL)
    if what in errors:
        raise errors[what]


def resolved(config: FakeConfig) -> dict:
    """What a job is; fields that came later count where they are set, so that ids and order stay what they were."""
    later = {"batch_size", "model"}
    values = config.model_dump(exclude={"name", "micro_batch_size", "loads", *later})
    return values | config.model_dump(include=later, exclude_defaults=True)


if "fake" not in KINDS:

    @KINDS.register("fake")
    def fake() -> JobKind:
        return JobKind(
            config=FakeConfig,
            run=run_fake,
            resolve=resolved,
            similar=lambda config: config["cost"],
            shares=lambda config: config["model"],
            heard=lambda now: (now["step"], now["loss"]) if now["stage"] == "fake" else None,
            seen=lambda run: list(zip(*run.curve("val_loss", "fake"), strict=True)) if run.config["steps"] else [],
        )


def plan(**values) -> dict:
    return {"kind": "fake", **values}


def done(log: str | Path) -> list[tuple]:
    """(a, b, seed) of every job that was carried to its end, in order."""
    return [(row["a"], row["b"], row["seed"]) for row in read_lines(log)[0]]


def process(folder: Path, values: dict, fate: str = "") -> subprocess.Popen:
    """`sweep.run(values, folder)` in a process of its own."""
    code = f"import fake_jobs\nfrom nbhelpers import sweep\nsweep.run({values!r}, {str(folder)!r})"
    environment = {**os.environ, "FAKE_FATE": fate, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def statuses(folder: Path) -> list[str]:
    """Of all run directories of a sweep."""
    return sorted(read_run(path.parent).status for path in (folder / "runs").glob("*/manifest.json"))
