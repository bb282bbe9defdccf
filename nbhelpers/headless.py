"""How are the notebooks executed without a person? By papermill, judged by their cells and by the runs they leave."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from nbhelpers import report
from nbhelpers.notebook import RUNS_VARIABLE
from nbhelpers.records import write_atomic
from nbhelpers.registry import unknown
from nbhelpers.runs import Run, read_run

CELL_SECONDS = 3600
RUN_TAG = "run"  # a notebook with a cell tagged so must leave a finished run
SWEEP_TAG = "sweep"  # or finished jobs of a sweep
KERNEL = "python3"
PLACES = {"folder"}  # parameters that name a place, seen from where the command is given
RESULT = "result.json"  # stands in the folder of a finished run
REFRESHED = Path("results/refresh")


class NotebookFailed(RuntimeError):
    """A cell failed; the message names notebook, cell and error, the output notebook is kept."""


def folder() -> Path:
    """The notebooks: here, or beside the package. LookupError where there are none."""
    for place in (Path("notebooks"), Path(__file__).parent.parent / "notebooks"):
        if any(place.glob("*.ipynb")):
            return place.resolve()
    raise LookupError("no folder 'notebooks' here; run this in the project's folder")


def choose(names: Sequence[str]) -> list[Path]:
    """The notebooks of these names in order, all if none is named; LookupError for an unknown one."""
    known = {path.stem: path for path in sorted(folder().glob("*.ipynb"))}
    wanted = [Path(name).stem for name in names] or list(known)
    for name in wanted:
        if name not in known:
            raise LookupError(unknown("notebook", name, known))
    return [known[name] for name in wanted]


def literal(text: str) -> object:
    """A command-line value as Python sees it: whole number, fraction, truth, None, or the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_parameters(path: Path, parameters: Mapping[str, object]) -> None:
    """LookupError for a name that the notebook's parameters cell does not have (papermill would only warn)."""
    import papermill

    known = papermill.inspect_notebook(str(path))
    for name in parameters:
        if name not in known:
            raise LookupError(f"{path.stem}: {unknown('parameter', name, known)}")


def run_notebooks(
    names: Sequence[str],
    parameters: Mapping[str, str],
    out: str | Path,
    *,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """Execute notebooks into `out`: notebooks/, runs/, index.html and results.zip. Returns what was found.

    Every notebook is tried even if an earlier one failed; `all_facts_hold` is False where one failed or a fact does not
    hold. LookupError for an unknown notebook or parameter, before anything is executed.
    """
    values = {name: literal(value) for name, value in parameters.items()}
    for name in PLACES & values.keys():  # a notebook runs in its own folder
        values[name] = os.path.abspath(values[name]) if values[name] else values[name]
    chosen = choose(names)
    for path in chosen:
        check_parameters(path, values)
    out = Path(out).resolve()
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, path in enumerate(chosen):
        if progress is not None:
            progress({"stage": f"notebook {path.stem}", "done": number, "total": len(chosen)})
        entries.append(_run_one(path, values, out))
    index = report.index_page(entries, out / "index.html")
    archive = report.archive(out)
    found = [fact for entry in entries for run in entry["runs"] if run.result for fact in run.result["facts"]]
    failed = [
        {"name": entry["title"], "ok": False, "says": "runs to its end", "saw": entry["error"]}
        for entry in entries
        if entry["error"]
    ]
    return {
        "notebooks": [
            {"name": e["name"], "error": e["error"], "runs": [r.folder.name for r in e["runs"]]} for e in entries
        ],
        "facts": [*found, *failed],
        "all_facts_hold": not failed and all(fact["ok"] for fact in found),
        "index": str(index),
        "archive": str(archive),
        "summary": summary(entries, index, archive),
    }


def _run_one(path: Path, values: Mapping[str, object], out: Path) -> dict:
    runs, tags = out / "runs", _tags(path)
    before = {run: (run / RESULT).is_file() for run in _run_folders(runs, tags)}
    error = None
    try:
        execute(path, out / "notebooks" / path.name, values, runs)
    except NotebookFailed as failure:
        error = str(failure)
    after = {run: (run / RESULT).is_file() for run in _run_folders(runs, tags)}  # one that was gone on with as well
    new = [read_run(run) for run, done in after.items() if run not in before or done > before[run]]
    if error is None:
        error = _unfinished(path, tags, new)
    return {"name": path.stem, "title": title(path), "error": error, "runs": new}


def _tags(path: Path) -> set[str]:
    import nbformat

    return {tag for cell in nbformat.read(path, 4).cells for tag in cell.metadata.get("tags", [])}


def _run_folders(runs: Path, tags: Collection[str]) -> list[Path]:
    """The runs that notebooks made of their own, of one with a sweep also its jobs; other folders hold what they looked
    at, such as example runs."""
    inside = [*runs.glob("*/manifest.json"), *(runs.glob("*/runs/*/manifest.json") if SWEEP_TAG in tags else ())]
    return sorted(manifest.parent for manifest in inside)


def _unfinished(path: Path, tags: Collection[str], runs: Sequence[Run]) -> str | None:
    if {RUN_TAG, SWEEP_TAG} & set(tags) and not any(run.result for run in runs):
        return f"{path.stem}: left no finished run"
    return next((f"{path.stem}: run {run.run_id} is {run.status}" for run in runs if not run.result), None)


def execute(path: Path, output: Path, values: Mapping[str, object], runs: Path) -> None:
    """Execute one notebook with papermill in a fresh kernel (a kernel that dies is started once more).

    Raises NotebookFailed; `output` is kept then, and says in its last cell what happened.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    for attempt in (1, 2):
        try:
            with _environment({RUNS_VARIABLE: str(runs), "NBHELPERS_HEADLESS": "1"}):
                done = execute_notebook(
                    str(path),
                    str(output),
                    parameters=dict(values),
                    kernel_name=KERNEL,
                    cwd=str(path.parent),
                    execution_timeout=CELL_SECONDS,
                    progress_bar=False,
                    log_output=False,
                )
        except PapermillExecutionError as error:
            raise NotebookFailed(
                f"{path.stem}: cell {error.exec_count} failed with {error.ename}: {error.evalue}; see {output}"
            ) from error
        except DeadKernelError as error:
            if attempt == 2:
                raise NotebookFailed(f"{path.stem}: the kernel died twice (out of memory?); see {output}") from error
            continue
        break
    empty = [
        cell for cell in done.cells if cell.cell_type == "code" and cell.source.strip() and not cell.execution_count
    ]
    if empty:
        raise NotebookFailed(f"{path.stem}: a cell was not executed ({empty[0].source.splitlines()[0]}); see {output}")


@contextmanager
def _environment(values: Mapping[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def title(path: Path) -> str:
    """The notebook's first heading."""
    import nbformat

    for cell in nbformat.read(path, 4).cells:
        found = re.search(r"^#+\s*(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if found:
            return found[1].strip()
    return path.stem


def summary(entries: Sequence[dict], index: Path, archive: Path) -> str:
    """What was found, a paragraph a notebook, and where index and archive are."""
    lines = []
    for entry in entries:
        lines.append(entry["title"])
        lines += [f"  FAILED {entry['error']}"] if entry["error"] else []
        checked = [fact for run in entry["runs"] for fact in (run.result["facts"] if run.result else [])]
        lines += [f"  {report.headline(run)}" for run in entry["runs"]]
        lines += [f"  {sum(fact['ok'] for fact in checked)} of {len(checked)} checked facts hold"] * bool(entry["runs"])
        if not entry["runs"] and not entry["error"]:
            lines.append(f"  ran to its end and made no run of its own: see notebooks/{entry['name']}.ipynb")
    return "\n".join([*lines, "", f"index    {index}", f"archive  {archive}"])


def refresh(names: Sequence[str]) -> list[Path]:
    """Execute the committed notebooks from a fresh kernel with their default parameters and store them cleaned:
    outputs and counts stay; widget state, timing and papermill's own metadata go.

    Their runs go to results/refresh, emptied first: what is committed shows no earlier runs of this machine.
    """
    import nbformat

    chosen, runs = choose(names), REFRESHED.resolve()
    shutil.rmtree(runs, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="nbhelpers-") as scratch:
        for path in chosen:
            done = Path(scratch) / path.name
            execute(path, done, {}, runs / path.stem)
            write_atomic(path, nbformat.writes(clean(nbformat.read(done, 4))) + "\n")
    return chosen


def join_streams(outputs: Sequence[dict]) -> list[dict]:
    """Pieces of text that a cell printed one after another as one output; how they were cut depends on timing."""
    joined: list[dict] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def clean(content):
    """A notebook without widget state, timing and papermill metadata; outputs and counts stay."""
    language = content.metadata.get("language_info", {})
    content.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
        "language_info": {"name": language.get("name", "python")},
    }
    for cell in content.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if "outputs" in cell:
            cell.outputs = join_streams(cell.outputs)
    return content
