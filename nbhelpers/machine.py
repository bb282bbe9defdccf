"""What does this machine have, and which models fit it? One answer for the command line and for the notebooks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nbhelpers import catalogue, memory, runtime
from nbhelpers.estimates import megabytes


def describe(job: str = "lora") -> dict[str, Any]:
    """{"environment", "memory", "job", "models"}: what is here, what is free, and every known model with what `job`
    would take. LookupError for an unknown job. Starts nothing but the look at the device."""
    runtime.prepare_cuda_allocator()
    weight_bytes = runtime.dtype_for(runtime.device()).itemsize
    suggestions = [asdict(found) for found in catalogue.suggest(job, weight_bytes=weight_bytes)]
    free = memory.free() | {"disk_free": shutil.disk_usage(".").free}
    return {"environment": runtime.environment(probe=True), "memory": free, "job": job, "models": suggestions}


def environment_text(found: Mapping[str, Any] | None = None, *, sums: bool = False) -> str:
    """What `describe` found, for people: the machine, what is free, and which models fit.

    sums: below each model also the sum behind the memory that it would take.
    """
    found = found or describe()
    here, free = found["environment"], found["memory"]
    device, cpu, git = here["device"], here["cpu"], here["git"]
    code = f"commit {git['commit'][:12]}{', changed since' if git['dirty'] else ''}" if git else "no git checkout"
    lines = [
        f"runs in    {here['where']}: Python {here['python']} on {here['platform']}",
        f"device     {device['type']}: {device['name']}",
        f"processor  {cpu['name']}, {cpu['logical_cores']} logical cores",
        f"memory     {_gigabytes(free['ram_free'])} free of {_gigabytes(free['ram_total'])}",
    ]
    for gpu in free["gpus"]:
        lines.append(f"gpu        {gpu['name']}: {_gigabytes(gpu['free'])} free of {_gigabytes(gpu['total'])}")
    lines.append(f"disk       {_gigabytes(free['disk_free'])} free in this folder")
    lines.append(f"libraries  {', '.join(f'{name} {version}' for name, version in here['libs'].items())}")
    lines += [f"code       {code}", "", f"models for {found['job']} (estimates to start from, nothing is changed):"]
    lines.append(f"       {'name':<14} {'download':>9} {'memory':>9}  licence")
    return "\n".join([*lines, *(line for model in found["models"] for line in _model_lines(model, sums))])


def _model_lines(model: Mapping[str, Any], sums: bool) -> list[str]:
    gate = {True: ", gated on the hub", False: "", None: ", gate unknown"}[model["gated"]]
    download = f"{model['download_bytes'] / 1e9:.2f} GB" if model["download_bytes"] else "bundled"
    sizes = f"{download:>9} {megabytes(model['required_bytes']):>9}"
    first = f"  {'fits' if model['fits'] else 'no  '} {model['name']:<14} {sizes}  {model['licence']}{gate}"
    return [first, f"       {model['sum']}"] if sums else [first]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
