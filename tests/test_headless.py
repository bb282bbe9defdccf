"""Are notebooks executed without a person judged by what really happened in them?"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nbhelpers import headless
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker, Interrupted

RUN = """from nbhelpers.notebook import runs_root
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker
with ExperimentTracker(ExperimentConfig(name="x", level=level), runs_root()) as tracker:
    tracker.finish({"verdict": f"level {level}", "facts": [{"name": "f", "ok": level < 1, "says": "s", "saw": "t"}],
                    "text": {"generated": False}})"""


def write(folder: Path, name: str, *sources: str, tag: str | None = None) -> Path:
    """A notebook with a heading, a parameters cell (level) and these cells; the last may carry a tag."""
    cells = [
        new_markdown_cell("# A question"),
        new_code_cell("level: float = 0.3  # share", metadata={"tags": ["parameters"]}),
    ]
    cells += [new_code_cell(source) for source in sources]
    if tag:
        cells[-1].metadata["tags"] = [tag]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "notebooks"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("3", 3),
        ("true", True),
        ("False", False),
        ("None", None),
        ("1e-3", 0.001),
        ("gradient", "gradient"),
    ],
)
def test_command_line_values_are_read_as_python_writes_them(text, value):
    assert headless.literal(text) == value and type(headless.literal(text)) is type(value)


GO_ON = """from nbhelpers.notebook import runs_root
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker
[folder] = runs_root().iterdir()
with ExperimentTracker(ExperimentConfig(name="x", level=0.3), run_dir=folder, resume=True) as tracker:
    tracker.finish({"verdict": "went on", "facts": [], "text": {"generated": False}})"""


def test_a_run_that_a_notebook_went_on_with_is_the_one_that_it_left(notebooks, tmp_path):
    config = ExperimentConfig(name="x", level=0.3)
    with pytest.raises(Interrupted), ExperimentTracker(config, tmp_path / "results" / "runs") as tracker:
        raise Interrupted("stopped")
    write(notebooks, "01_on", GO_ON, tag="run")
    found = headless.run_notebooks([], {}, tmp_path / "results")
    assert found["all_facts_hold"] and found["notebooks"][0]["runs"] == [tracker.run_dir.name]
    assert "went on" in found["summary"]


def test_a_run_is_collected_with_its_facts_index_and_archive(notebooks, tmp_path):
    write(notebooks, "01_good", RUN, tag="run")
    found = headless.run_notebooks([], {"level": "0.25"}, tmp_path / "results")
    assert found["all_facts_hold"] and found["facts"] == [{"name": "f", "ok": True, "says": "s", "saw": "t"}]
    assert "level 0.25" in found["summary"] and found["index"] in found["summary"]
    assert "level 0.25" in Path(found["index"]).read_text()
    assert Path(found["archive"]).is_file() and (tmp_path / "results" / "notebooks" / "01_good.ipynb").is_file()


def test_a_fact_that_does_not_hold_makes_the_whole_fail(notebooks, tmp_path):
    write(notebooks, "01_bad", RUN, tag="run")
    assert headless.run_notebooks([], {"level": "1"}, tmp_path / "results")["all_facts_hold"] is False


def test_a_failing_cell_is_named_and_the_output_notebook_kept(notebooks, tmp_path):
    write(notebooks, "01_fails", "1 / 0")
    found = headless.run_notebooks([], {}, tmp_path / "results")
    assert found["all_facts_hold"] is False
    assert "01_fails: cell 2 failed with ZeroDivisionError: division by zero" in found["notebooks"][0]["error"]
    assert "ZeroDivisionError" in (tmp_path / "results" / "notebooks" / "01_fails.ipynb").read_text()


def test_a_notebook_that_should_leave_a_run_and_does_not_has_failed(notebooks, tmp_path):
    write(notebooks, "01_nothing", "x = 1", tag="run")
    assert "left no finished run" in headless.run_notebooks([], {}, tmp_path / "results")["notebooks"][0]["error"]


def test_a_notebook_that_made_no_run_has_not_failed_and_folders_it_looked_at_are_no_runs(notebooks, tmp_path):
    write(
        notebooks,
        "05_looks",
        "from nbhelpers.notebook import runs_root\n(runs_root() / 'example-grid').mkdir(parents=True)",
    )
    found = headless.run_notebooks([], {}, tmp_path / "results")
    assert found["all_facts_hold"] and found["notebooks"] == [{"name": "05_looks", "error": None, "runs": []}]
    assert "made no run of its own: see notebooks/05_looks.ipynb" in found["summary"]
    assert 'href="notebooks/05_looks.ipynb"' in Path(found["index"]).read_text()


def test_a_folder_parameter_is_seen_from_where_the_command_is_given(notebooks, tmp_path):
    path = write(notebooks, "05_looks", "assert folder is None or __import__('os').path.isdir(folder), folder")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].source += "\nfolder: str = None  # where"
    nbformat.write(notebook, path)
    (tmp_path / "mine").mkdir()
    assert headless.run_notebooks([], {"folder": "mine"}, tmp_path / "a")["all_facts_hold"]
    assert headless.run_notebooks([], {"folder": "None"}, tmp_path / "b")["all_facts_hold"]
    assert not headless.run_notebooks([], {"folder": "other"}, tmp_path / "c")["all_facts_hold"]


def test_a_notebook_that_exits_quietly_has_failed(notebooks, tmp_path):
    write(notebooks, "01_exit", "import sys\nsys.exit(0)", RUN, tag="run")
    assert headless.run_notebooks([], {}, tmp_path / "results")["notebooks"][0]["error"]


def test_a_kernel_that_dies_is_started_once_more_and_then_reported(notebooks, tmp_path):
    write(notebooks, "01_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "the kernel died twice" in headless.run_notebooks([], {}, tmp_path / "results")["notebooks"][0]["error"]


def test_an_unknown_parameter_is_an_error_before_anything_runs(notebooks, tmp_path):
    write(notebooks, "01_good", RUN)
    with pytest.raises(LookupError, match=r"01_good: unknown parameter 'levle'. Did you mean 'level'"):
        headless.run_notebooks([], {"levle": "0.5"}, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_an_unknown_notebook_is_an_error_that_lists_the_known_ones(notebooks):
    write(notebooks, "01_good", RUN)
    with pytest.raises(LookupError, match="unknown notebook '01_god'. Did you mean '01_good'"):
        headless.choose(["01_god"])
    assert [path.stem for path in headless.choose(["01_good.ipynb"])] == ["01_good"]


def test_cleaning_keeps_outputs_and_counts_and_drops_widgets_and_timing():
    view = "application/vnd.jupyter.widget-view+json"
    output = new_output("display_data", data={view: {}, "text/plain": "x"})
    cell = new_code_cell(
        "x", execution_count=3, outputs=[output], metadata={"papermill": {"duration": 1}, "tags": ["run"]}
    )
    content = headless.clean(
        new_notebook(
            cells=[cell], metadata={"papermill": {}, "widgets": {}, "language_info": {"name": "python", "version": "3"}}
        )
    )
    assert content.cells[0].execution_count == 3 and content.cells[0].metadata == {"tags": ["run"]}
    assert content.cells[0].outputs[0].data == {"text/plain": "x"}
    assert set(content.metadata) == {"kernelspec", "language_info"} and content.metadata.language_info == {
        "name": "python"
    }


def test_text_that_was_printed_in_pieces_is_stored_as_one():
    pieces = [
        new_output("stream", name=name, text=text) for name, text in [("stdout", "a"), ("stdout", "b"), ("stderr", "c")]
    ]
    assert [(o.name, o.text) for o in headless.join_streams(pieces)] == [("stdout", "ab"), ("stderr", "c")]


def test_refresh_stores_the_outputs_of_a_fresh_run_and_shows_no_earlier_ones(notebooks, tmp_path):
    from nbhelpers import notebook

    path = write(notebooks, "01_good", RUN + "\nprint(tracker.run_dir.parent.name, level)")
    (tmp_path / headless.REFRESHED / "old").mkdir(parents=True)
    assert headless.refresh([]) == [path]
    stored = nbformat.read(path, 4)
    assert [cell.get("execution_count") for cell in stored.cells[1:]] == [1, 2]
    assert stored.cells[-1].outputs[0].text == "01_good 0.3\n" and "papermill" not in stored.metadata
    assert not (tmp_path / headless.REFRESHED / "old").exists() and notebook.RUNS_VARIABLE not in os.environ
