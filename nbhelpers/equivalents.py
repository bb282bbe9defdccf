"""How is the same run said elsewhere? A config as a command line, a papermill line and three lines of Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel


def changed(config: BaseModel) -> dict[str, Any]:
    """The fields that are not at their default, in the order of the class."""
    fields = type(config).model_fields
    return {name: value for name, value in config.model_dump().items() if value != fields[name].default}


def command_line(command: str, config: BaseModel) -> str:
    """`nbhelpers prune-heads --level 0.5 ...`: gives the same config hash."""
    words = ["nbhelpers", command]
    for name, value in changed(config).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, str(value)]
    return shlex.join(words)


def papermill_line(
    notebook: str, config: BaseModel, parameters: Sequence[str], more: str = "more", preset: Iterable[str] = ()
) -> str:
    """`papermill notebook.ipynb out.ipynb ...`: fields without a parameter of their own travel in the one named `more`.

    Fields that the notebook's parameters name are all written out, so that a preset in it changes nothing. preset: the
    fields that the notebook's first preset sets; one that is None here must say so, since None in a parameter of its
    own leaves it to the preset.
    """
    values = config.model_dump()
    own = {name: values[name] for name in parameters if name in values}
    rest = {name: value for name, value in changed(config).items() if name not in own}
    rest |= {name: values[name] for name in preset if name not in own or own[name] is None}
    words = _papermill(notebook)
    words += [word for name, value in own.items() if value is not None for word in ("-p", name, _literal(value))]
    words += ["-y", f"{more}: {json.dumps(rest)}"] if rest else []
    return shlex.join(words)


def _papermill(notebook: str) -> list[str]:
    return ["papermill", f"{notebook}.ipynb", f"{notebook}-done.ipynb", "-k", "python3"]


def _literal(value: Any) -> str:
    return str(value)  # papermill reads True and False, and numbers, as Python writes them


def python_lines(config: BaseModel, experiment: type, run_dir: str | None = None) -> str:
    """Three lines that run the same from Python. run_dir: of an interrupted run to go on with."""
    name, runner = type(config).__name__, experiment.__name__
    arguments = ", ".join(f"{field}={value!r}" for field, value in changed(config).items())
    going_on = f", run_dir={run_dir!r}, resume=True" if run_dir else ""
    return (
        f"from {experiment.__module__} import {name}, {runner}\n"
        f"config = {name}({arguments})\nresult = {runner}.run(config{going_on})"
    )


def all_lines(
    command: str,
    notebook: str,
    config: BaseModel,
    parameters: Sequence[str],
    experiment: type,
    preset: Iterable[str] = (),
    run_dir: str | None = None,
) -> Mapping[str, str]:
    """{"command line": ..., "papermill": ..., "Python": ...} for the panel. run_dir: of a run to go on with."""
    line, mill = command_line(command, config), papermill_line(notebook, config, parameters, preset=preset)
    if run_dir:
        line += f" --out {shlex.quote(run_dir)} --resume"
        mill = shlex.join([*_papermill(notebook), "-p", "resume", run_dir])
    return {"command line": line, "papermill": mill, "Python": python_lines(config, experiment, run_dir)}
