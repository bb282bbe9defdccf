"""What does one log call cost, beside other trackers, and what can be read back after SIGKILL?

    python benchmarks/tracking.py [--out benchmarks/results] [--readme README.md]

Cost: every tool logs the same five numbers, in one process, in blocks in turn, and each call is timed alone; p50 and
p99 are over all calls. Survival: a process of its own logs N times and kills itself with SIGKILL right after the last
call returned; some seconds later (a tool's own service process may still be writing) the lines are counted. Tools that
are not installed are listed as not compared. Writes tracking.json and tracking.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _measuring import RESULTS, processor, publish

CALLS, BLOCK, WARM = 2000, 100, 100
KILLED_AFTER = (1, 100, 1000)
SETTLE_SECONDS = 5.0
COMMAND = "python benchmarks/tracking.py --readme README.md"
MARK = "<!-- tracking: made by benchmarks/tracking.py -->"


def numbers(step: int) -> dict[str, float]:
    return {
        "train_loss": 1.0 / (step + 1),
        "learning_rate": 1e-3,
        "tokens_per_sec": 100.0 + step,
        "grad_norm": 0.5,
        "accuracy": step / (step + 1),
    }


# each opens a log in a folder and returns (log one step, close); and counts the steps that a folder gives back


def open_ours(folder: Path) -> tuple[Callable[[int], object], Callable[[], object]]:
    from nbhelpers.tracking import ExperimentConfig, ExperimentTracker

    run = ExperimentTracker(ExperimentConfig(name="benchmark"), run_dir=folder / "run", environment={}).start()
    return lambda step: run.log_metrics(step, **numbers(step)), run.finish


def count_ours(folder: Path) -> int:
    from nbhelpers.runs import read_run

    return len(read_run(folder / "run").curve("train_loss")[0])


def open_wandb(folder: Path) -> tuple[Callable[[int], object], Callable[[], object]]:
    import wandb

    settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True)
    run = wandb.init(mode="offline", dir=str(folder), project="benchmark", settings=settings)
    return lambda step: run.log(numbers(step), step=step), run.finish


def count_wandb(folder: Path) -> int:
    from wandb.proto.wandb_internal_pb2 import Record

    found = 0
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for content in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            keys = {item.key or ".".join(item.nested_key) for item in record.history.item}
            found += "train_loss" in keys
    return found


def wandb_records(content: bytes, block: int = 32768) -> list[bytes]:
    """The whole records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    records, place, begun = [], 7, b""
    while place + 7 <= len(content):
        left = block - place % block
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        piece = content[place + 7 : place + 7 + length]
        if kind == 0 or len(piece) < length:
            break
        begun = piece if kind in (1, 2) else begun + piece
        if kind in (1, 4):
            records.append(begun)
        place += 7 + length
    return records


def open_mlflow(folder: Path) -> tuple[Callable[[int], object], Callable[[], object]]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    run = client.create_run(client.create_experiment("benchmark")).info.run_id
    from mlflow.entities import Metric

    def log(step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(key, value, now, step) for key, value in numbers(step).items()])

    return log, lambda: client.set_terminated(run)


def count_mlflow(folder: Path) -> int:
    files = list(folder.glob("mlruns/*/*/metrics/train_loss"))
    return sum(len(line.split()) == 3 for path in files for line in path.read_text().splitlines())


def open_tensorboard(folder: Path) -> tuple[Callable[[int], object], Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "board"))

    def log(step: int) -> None:
        for key, value in numbers(step).items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def count_tensorboard(folder: Path) -> int:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    events = [event for path in folder.glob("board/*") for event in LegacyEventFileLoader(str(path)).Load()]
    return sum(value.tag == "train_loss" for event in events for value in event.summary.value)


TOOLS = {
    "nbhelpers": (open_ours, count_ours, "nbhelpers"),
    "W&B offline": (open_wandb, count_wandb, "wandb"),
    "MLflow file store": (open_mlflow, count_mlflow, "mlflow-skinny"),
    "TensorBoard SummaryWriter": (open_tensorboard, count_tensorboard, "tensorboard"),
}


def version(package: str) -> str | None:
    for name in (package, package.removesuffix("-skinny")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def measure_cost(tools: list[str], calls: int = CALLS) -> dict[str, list[float]]:
    """Microseconds of every call, by tool."""
    with tempfile.TemporaryDirectory() as place:
        opened = {}
        for name in tools:
            folder = Path(place) / str(len(opened))
            folder.mkdir()
            opened[name] = TOOLS[name][0](folder)
        took: dict[str, list[float]] = {name: [] for name in tools}
        for step in range(WARM):
            for log, _ in opened.values():
                log(step)
        for begin in range(WARM, WARM + calls, BLOCK):
            for name, (log, _) in opened.items():
                for step in range(begin, begin + BLOCK):
                    start = time.perf_counter_ns()
                    log(step)
                    took[name].append((time.perf_counter_ns() - start) / 1000)
        for _, close in opened.values():
            close()
    return took


def survivors(name: str, calls: int) -> int:
    """How many of `calls` steps can be read back after a SIGKILL right after the last one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run([sys.executable, __file__, "--victim", name, folder, str(calls)], capture_output=True)
        if done.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the process of {name} did not get to its kill: {done.stderr.decode()[-2000:]}")
        time.sleep(0 if name == "nbhelpers" else SETTLE_SECONDS)
        return TOOLS[name][1](Path(folder))


def victim(name: str, folder: str, calls: str) -> None:
    log, _ = TOOLS[name][0](Path(folder))
    for step in range(int(calls)):
        log(step)
    os.kill(os.getpid(), signal.SIGKILL)


def summarise(took: dict[str, list[float]], survived: dict[str, dict[str, int]]) -> list[dict]:
    rows = []
    for name, calls in took.items():
        cuts = statistics.quantiles(calls, n=100, method="inclusive")
        rows.append({"tool": name, "p50": cuts[49], "p99": cuts[98], "calls": len(calls), "survived": survived[name]})
    return rows


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine, rows = found["machine"], found["tools"]
    kills = list(rows[0]["survived"])
    intro = (
        f"Microseconds of one call that logs five numbers ({rows[0]['calls']} calls each, one process, the tools in "
        f"turn), and steps that can be read back after SIGKILL right after call N; on {machine['processor']}, "
        f"{machine['cores']} cores, Python {machine['python']}. Made by `{COMMAND}`; all numbers are in "
        "[benchmarks/results/tracking.json](benchmarks/results/tracking.json)."
    )
    lines = [
        intro,
        "",
        "| tool | p50 µs | p99 µs | " + " | ".join(f"left of {calls}" for calls in kills) + " |",
        "|---" * (3 + len(kills)) + "|",
    ]
    for row in rows:
        left = " | ".join(str(row["survived"][calls]) for calls in kills)
        name = f"{row['tool']} {found['versions'][row['tool']]}"
        lines.append(f"| {name} | {row['p50']:.1f} | {row['p99']:.1f} | {left} |")
    by = {row["tool"]: row for row in rows}
    if "W&B offline" in by:
        lines += ["", f"nbhelpers' p50 is {by['nbhelpers']['p50'] / by['W&B offline']['p50']:.3f} of W&B offline's."]
    lines += [f"Not compared, because it is not installed: {name}." for name in found["not_compared"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victim", nargs=3, metavar=("TOOL", "FOLDER", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--readme")
    options = parser.parse_args()
    if options.victim:
        victim(*options.victim)

    versions = {name: version(package) for name, (_, _, package) in TOOLS.items()}
    there = [name for name in TOOLS if versions[name]]
    survived = {name: {str(calls): survivors(name, calls) for calls in KILLED_AFTER} for name in there}
    load = os.getloadavg()
    found = {
        "tools": summarise(measure_cost(there), survived),
        "versions": {name: versions[name] for name in there},
        "not_compared": [name for name in TOOLS if not versions[name]],
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_before": load,
        },
    }
    publish("tracking", found, markdown(found), options.out, options.readme, MARK)


if __name__ == "__main__":
    main()
