"""Runs for tests: in this process, in a bare process of their own, and killed ones."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from nbhelpers import tracking
from nbhelpers.records import read_json, write_json
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker

REPOSITORY = Path(tracking.__file__).parents[1]
CONFIG = ExperimentConfig(name="try", kind="test", learning_rate=1e-3)
PRELUDE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from nbhelpers.runlock import RunLock
from nbhelpers.runs import read_run
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker
config = ExperimentConfig(name="try", kind="test", learning_rate=1e-3)
def tracker(folder, **more):
    return ExperimentTracker(config, run_dir=folder, environment={{}}, command=["test"], **more)
"""


def tracker(folder, config=CONFIG, **more):
    return ExperimentTracker(config, run_dir=folder, **{"environment": {}, "command": ["test"], **more})


def script(code, *arguments, **more):
    """A process of its own without site-packages: no NumPy, no torch, no pydantic."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PRELUDE + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def killed_run(folder, code=""):
    """A run whose process killed itself after two lines and whatever `code` does."""
    process = script(
        "t = tracker(sys.argv[1]).start()\n"
        "for loss in (3.0, 2.0): t.increment_gradient_step(2); t.log_metrics(train_loss=loss)\n"
        f"{code}\nos.kill(os.getpid(), signal.SIGKILL)",
        folder,
    )
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def age(path, seconds, **changes):
    """Make the owner in a lock or heartbeat file look `seconds` old."""
    owner = read_json(path)
    then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
    write_json(path, {**owner, "utc": then, **changes})
