"""What do the benchmarks share? The machine they ran on, medians and ratios, promises, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


# Where it was measured ------------------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(*packages: str, **more: Any) -> dict[str, Any]:
    """Processor, device, torch's threads and the load at this moment, and the versions of `packages` beside torch's."""
    import torch

    return {
        "processor": processor(),
        "device": torch.cuda.get_device_name() if device() == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        **more,
        "load_before": os.getloadavg(),
    }


def child(file: str, *job: Any) -> dict:
    """One measurement in a process of its own: `python FILE --child JOB`, whose last line is its answer as JSON."""
    done = subprocess.run([sys.executable, file, "--child", json.dumps(job)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{job} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Rounds, and what was promised of them --------------------------------------------------------------------------------


def span(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """The span of the rounds' ratios."""
    return span([a / b for a, b in zip(one, other, strict=True)])


def target(what: str, sign: str, wanted: float, seen: float) -> dict[str, Any]:
    """A promise, and what was measured of it. sign: ">=" or "<="."""
    met = seen >= wanted if sign == ">=" else seen <= wanted
    return {"what": what, "sign": sign, "wanted": wanted, "seen": seen, "met": bool(met)}


def target_line(one: Mapping[str, Any], wanted: str = "g", seen: str | None = None) -> str:
    """The promise as a line of a list; `wanted` and `seen` are the formats of the two numbers."""
    seen = seen or (".1e" if one["wanted"] < 0.01 else ".2f")
    limit, kept = "at least" if one["sign"] == ">=" else "at most", "met" if one["met"] else "NOT met"
    return f"- {one['what']}: {limit} {one['wanted']:{wanted}} was promised, {one['seen']:{seen}} measured: {kept}."


# Where results go -----------------------------------------------------------------------------------------------------


def publish(name: str, found: Any, text: str, out: str | Path | None, readme: str | None, mark: str) -> None:
    """Write NAME.json and NAME.md into `out` (None: nothing), and the text into the README's place (None: not)."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (Path(out) / f"{name}.md").write_text(text, encoding="utf-8")
    if readme:
        put_into(Path(readme), text, mark)
    print(text)


def put_into(path: Path, text: str, mark: str) -> None:
    """Replace what stands between the two marks."""
    before, _, after = path.read_text(encoding="utf-8").split(mark)
    path.write_text(f"{before}{mark}\n{text}{mark}{after}", encoding="utf-8")
