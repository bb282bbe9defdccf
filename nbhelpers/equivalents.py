"""How is the same run said elsewhere? A config as a command line, a papermill line and three lines of Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
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


def papermill_line(notebook: str, config: BaseModel, parameters: Sequence[str], more: str = "more") -> str:
    """`papermill notebook.ipynb out.ipynb ...`: fields without a parameter of their own travel in the one named `more`.

    Fields that the notebook's parameters name are all written out, so that a preset in it changes nothing.
    """
    values = config.model_dump()
    own = {name: values[name] for name in parameters if name in values}
    rest = {name: value for name, value in changed(config).items() if name not in own}
    words = ["papermill", f"{notebook}.ipynb", f"{notebook}-done.ipynb", "-k", "python3"]
    words += [word for name, value in own.items() if value is not None for word in ("-p", name, _literal(value))]
    words += ["-y", f"{more}: {json.dumps(rest)}"] if rest else []
    return shlex.join(words)


def _literal(value: Any) -> str:
    return str(value)  # papermill reads True and False, and numbers, as Python writes them


def python_lines(config: BaseModel, experiment: str = "PruningExperiment") -> str:
    """Three lines that run the same from Python."""
    name = type(config).__name__
    arguments = ", ".join(f"{field}={value!r}" for field, value in changed(config).items())
    return (
        f"from nbhelpers.experiments import {name}, {experiment}\n"
        f"config = {name}({arguments})\nresult = {experiment}.run(config)"
    )


def all_lines(command: str, notebook: str, config: BaseModel, parameters: Sequence[str]) -> Mapping[str, str]:
    """{"command line": ..., "papermill": ..., "Python": ...} for the panel."""
    return {
        "command line": command_line(command, config),
        "papermill": papermill_line(notebook, config, parameters),
        "Python": python_lines(config),
    }
