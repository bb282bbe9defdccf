"""How does a run get into another tool's viewer? From its run directory, after it or while it goes on.

TensorBoard and W&B are extras; nothing of them is imported before it is needed. What is exported was read from the run
directory and is masked once more: secrets stay out. W&B is written offline and sent nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from nbhelpers.records import canonical_json, check_output_folder, plain, restore, slug
from nbhelpers.redaction import Redactor
from nbhelpers.run_config import MetricsSnapshot
from nbhelpers.runs import Run, read_run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """folder: what to open. points: numbers written. skipped: metrics that are no numbers (texts, lists), by name."""

    folder: Path
    points: int
    skipped: tuple[str, ...]


def export_tensorboard(run_dir: str | os.PathLike, out: str | os.PathLike) -> Export:
    """Write the curves as TensorBoard event files into `out/<run id>`; view with `tensorboard --logdir OUT`.

    Tags are `metric`, or `stage/metric` where the run has stages; each point keeps its iteration, and its time is the
    run's start plus its seconds at work. The config and notes are texts. A second export takes the place of the first.
    """
    writers = _module("tensorboard.summary.writer.event_file_writer", "TensorBoard", "tensorboard")
    run = _redacted(run_dir)
    folder = check_output_folder(out, resume=True) / slug(run.run_id)
    if folder.is_dir():
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    check_output_folder(folder)
    start = _start(run)
    points, skipped = 0, set()
    writer = writers.EventFileWriter(os.fspath(folder))
    try:
        writer.add_event(_text_event("config", f"    {canonical_json(run.config)}", 0, start))
        for number, note in enumerate(_notes(run)):
            writer.add_event(_text_event("notes", note, number, start))
        for snapshot, name, value in _values(run, skipped):
            writer.add_event(_scalar_event(name, value, snapshot.iteration, start + snapshot.wallclock_time))
            points += 1
    finally:
        writer.close()
    return _done(folder, points, skipped)


def export_wandb(run_dir: str | os.PathLike, out: str | os.PathLike, project: str = "nbhelpers") -> Export:
    """Write the run as an offline W&B run below `out/wandb`; upload it, if you want to, with `wandb sync FOLDER`.

    Metrics are `metric`, or `stage/metric`; their x axis is `iteration`, or `stage/iteration`. W&B's own look at this
    machine, process and code is switched off: what it gets is the run directory. A second export takes the place of
    the first.
    """
    wandb = _module("wandb", "W&B", "wandb")
    run = _redacted(run_dir)
    out = check_output_folder(out, resume=True)
    out.mkdir(parents=True, exist_ok=True)
    identity = slug(run.run_id, 64)
    for old in (out / "wandb").glob(f"offline-run-*-{identity}"):
        shutil.rmtree(old)
    points, skipped = 0, set()
    with _quiet_wandb(), _wandb_run(wandb, run, out, project, identity) as target:
        folder = Path(target.dir).parent
        steps: dict[tuple[str | None, int], dict[str, Any]] = {}
        for snapshot, name, value in _values(run, skipped):
            axis = f"{snapshot.stage}/iteration" if snapshot.stage else "iteration"
            step = steps.setdefault((snapshot.stage, snapshot.iteration), {axis: snapshot.iteration})
            if name not in step:
                target.define_metric(name, step_metric=axis)
            step[name] = value
            points += 1
        for step in steps.values():
            target.log(step)
        result = {key: value for key, value in (run.result or {}).items() if isinstance(value, int | float | str)}
        target.summary.update({f"result/{key}": value for key, value in result.items()})
    return _done(folder, points, skipped)


def _scalar_event(name: str, value: float, step: int, moment: float) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    found = Summary(value=[Summary.Value(tag=name, simple_value=value)])
    return Event(wall_time=moment, step=step, summary=found)


def _text_event(name: str, text: str, step: int, moment: float) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    tensor = make_tensor_proto(text.encode("utf-8"))
    value = Summary.Value(tag=name, metadata=create_summary_metadata(name, None), tensor=tensor)
    return Event(wall_time=moment, step=step, summary=Summary(value=[value]))


@contextlib.contextmanager
def _wandb_run(wandb: Any, run: Run, out: Path, project: str, identity: str) -> Iterator[Any]:
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    target = wandb.init(
        mode="offline",
        dir=os.fspath(out),
        project=project,
        id=identity,
        name=run.name[:128],
        job_type=run.kind[:64],
        notes="\n".join(_notes(run)) or None,
        config=run.config,
        settings=settings,
    )
    try:
        yield target
    finally:
        target.finish()
        if wandb.run is None:  # its service closes the file on its way out: until then what was logged may be in memory
            wandb.teardown()


@contextlib.contextmanager
def _quiet_wandb() -> Iterator[None]:
    """W&B keeps the command line of the process in its log, and takes settings from WANDB_*: neither belongs here."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        yield
    finally:
        del os.environ["WANDB_ERROR_REPORTING"]
        os.environ.update(kept)


def _module(name: str, tool: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{tool} is not installed ({error}): pip install 'nbhelpers[{extra}]', or pip install {extra}"
        ) from error


def _redacted(run_dir: str | os.PathLike) -> Run:
    run, mask = read_run(run_dir), Redactor()
    run.name, run.kind = mask.text(run.name), mask.text(run.kind)
    run.config, run.metrics = mask.value(run.config), mask.value(run.metrics)
    run.events, run.result = mask.value(run.events), mask.value(run.result)
    return run


def _values(run: Run, skipped: set[str]) -> Iterator[tuple[MetricsSnapshot, str, float]]:
    """(snapshot, name, number) of all that was logged, NaN and infinities as such."""
    for row in run.metrics:
        snapshot = MetricsSnapshot.from_dict(row)
        prefix = f"{snapshot.stage}/" if snapshot.stage else ""
        measures = restore(plain(snapshot.to_dict()))
        for key in ("iteration", "wallclock_time", "attempt", "stage"):
            measures.pop(key, None)
        for key, value in measures.items():
            if isinstance(value, int | float):
                yield snapshot, prefix + key, value
            elif value is not None:
                skipped.add(prefix + key)


def _notes(run: Run) -> list[str]:
    return [str(event["text"]) for event in run.events if event.get("kind") == "note" and "text" in event]


def _start(run: Run) -> float:
    """Seconds since 1970 at which the run began."""
    return datetime.fromisoformat(run.manifest["created"]).timestamp() if run.manifest.get("created") else 0.0


def _done(folder: Path, points: int, skipped: set[str]) -> Export:
    if skipped:
        _log.warning("not exported, because they are no numbers: %s", ", ".join(sorted(skipped)))
    return Export(folder, points, tuple(sorted(skipped)))
