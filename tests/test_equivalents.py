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


def test_what_the_notebooks_preset_sets_is_written_out_also_where_it_is_none_or_a_default():
    line = equivalents.papermill_line("02", Settings(), ["level", "prompt"], preset=["prompt", "batch_size", "level"])
    words = shlex.split(line)
    assert words[5:] == ["-p", "level", "0.3", "-y", 'more: {"prompt": null, "batch_size": 8}']


def test_a_run_to_go_on_with_is_named_in_every_line():
    experiment = type("Experiment", (), {"__module__": "somewhere"})
    lines = equivalents.all_lines("tune", "02", Settings(), ["level"], experiment, run_dir="my runs/a")
    assert lines["command line"] == "nbhelpers tune --out 'my runs/a' --resume"
    assert lines["papermill"] == "papermill 02.ipynb 02-done.ipynb -k python3 -p resume 'my runs/a'"
    assert lines["Python"].endswith("Experiment.run(config, run_dir='my runs/a', resume=True)")


def test_the_python_lines_are_three():
    experiment = type("Experiment", (), {"__module__": "somewhere"})
    assert equivalents.python_lines(Settings(prompt="a'b"), experiment).splitlines() == [
        "from somewhere import Settings, Experiment",
        'config = Settings(prompt="a\'b")',
        "result = Experiment.run(config)",
    ]
