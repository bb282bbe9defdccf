"""Is a config said elsewhere still the same config? (The lines of the panel are executed in test_pruning_panel.py.)"""

from __future__ import annotations

import shlex

from pydantic import BaseModel

from nbhelpers import equivalents


class Settings(BaseModel):
    level: float = 0.3
    control: bool = True
    kv_groups: bool = False
    prompt: str | None = None
    batch_size: int = 8


def test_the_command_line_names_only_what_was_changed_and_quotes_it():
    config = Settings(level=0.5, control=False, kv_groups=True, prompt="it's; rm -rf")
    line = equivalents.command_line("prune-heads", config)
    assert line.startswith("nbhelpers prune-heads --level 0.5 --no-control --kv-groups --prompt ")
    assert shlex.split(line)[-1] == "it's; rm -rf"
    assert equivalents.command_line("prune-heads", Settings()) == "nbhelpers prune-heads"


def test_the_papermill_line_writes_the_notebooks_parameters_out_and_puts_the_rest_into_more():
    line = equivalents.papermill_line("01", Settings(level=0.5, batch_size=4), ["level", "control", "prompt"])
    words = shlex.split(line)
    assert words[:5] == ["papermill", "01.ipynb", "01-done.ipynb", "-k", "python3"]
    assert words[5:11] == ["-p", "level", "0.5", "-p", "control", "True"]
    assert words[11:] == ["-y", 'more: {"batch_size": 4}']


def test_the_python_lines_are_three():
    assert equivalents.python_lines(Settings(prompt="a'b"), "Experiment").splitlines() == [
        "from nbhelpers.experiments import Settings, Experiment",
        'config = Settings(prompt="a\'b")',
        "result = Experiment.run(config)",
    ]
