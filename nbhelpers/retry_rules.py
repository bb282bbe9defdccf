"""Is a job that failed tried again by itself? One rule for each class of failure, the same for every executor.

    out of memory   again with half the micro-batch, down to 1, where the kind of job has one; that is no part of what
                    a job is, so its result stays comparable
    diverged        no: the same seed would diverge again
    bad input       no
    error           no; the traceback stands in events.jsonl of its run
    (a process that was killed under a job leaves no class: the job goes on from its checkpoint in another one, and is
     given up as an `error` once KILLED in a row came to the same point)

What was decided stands in ledger.jsonl as an event `retry`. `sweep retry` is for persons, and asks for any class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers import predictions
from nbhelpers.records import read_lines
from nbhelpers.runs import read_run

KILLED = 4  # tries of a job in which its process was killed without getting further; Spark and Hadoop stop there too
MICRO_BATCH = "micro_batch_size"


def again(failure: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a failed job is tried again with: {"micro_batch_size": half of it}; None where it stays failed.

    >>> again("out of memory", {"micro_batch_size": None, "batch_size": 32})
    {'micro_batch_size': 16}
    """
    if failure != "out of memory" or MICRO_BATCH not in config:
        return None
    size = config[MICRO_BATCH] or config["batch_size"]
    return {MICRO_BATCH: size // 2} if size > 1 else None


def config_now(config: Mapping[str, Any], notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A job's config with what the last retry changed; a person's retry changes nothing, and begins anew."""
    last = next((note for note in reversed(notes) if note["event"] == "retry"), {})
    return {**config, **({MICRO_BATCH: last[MICRO_BATCH]} if MICRO_BATCH in last else {})}


def reached(run_dir: Path) -> int:
    """How far a try has come: the steps in its record and the answers on file; 0 before there is a record."""
    try:
        steps = len(read_run(run_dir).metrics)
    except (OSError, ValueError):
        return 0
    return steps + len(read_lines(run_dir / predictions.FILE)[0])


def killed(notes: Sequence[Mapping[str, Any]], at: int | None = None) -> int:
    """How many tries in a row began and never ended. at: only those that began where the job stands now."""
    count = 0
    for note in reversed(notes):
        if note["event"] != "started" or (at is not None and note.get("reached") != at):
            break
        count += 1
    return count


def killed_error(at: int) -> RuntimeError:
    """What is recorded of a job that is given up."""
    where = f"after {at} steps or answers" if at else "before its first step"
    return RuntimeError(
        f"its process was killed {KILLED} times in a row {where} (by the system where memory ends, or by hand), so it "
        "is not tried again: look at log.txt of its runs, give it less to hold, then sweep retry --class error"
    )
