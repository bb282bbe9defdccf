"""What does a comparison of large and small models leave for people? A self-contained page, a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbhelpers import comparison_html
from nbhelpers import comparison_tables as tables
from nbhelpers.plots_comparison import MEASURE_NAMES, full_name, interval, ordered
from nbhelpers.records import write_atomic
from nbhelpers.runs import Run, read_run

NAME = "report.html"


def write(run_dir: str | Path) -> Path:
    """Write report.html into a finished run of a comparison; returns its path.

    Dialogues stand in it only where the run's config says keep_text, beside the errors. ValueError where the folder
    holds another kind of run, or one that has no result.
    """
    run = read_run(run_dir)
    if run.kind != "comparison":
        raise ValueError(f"'{run_dir}' is a run of kind {run.kind!r}, this report is of 'comparison': use report DIR")
    if run.result is None:
        raise ValueError(f"'{run_dir}' has no result ({run.status}): finish it with compare run first")
    texts = kept_texts(run) if run.config.get("keep_text") else {}
    path = Path(run_dir) / NAME
    write_atomic(path, comparison_html.page(run.result, run.manifest, texts))
    return path


def kept_texts(run: Run) -> dict[str, str]:
    """Row id -> dialogue, read again from the run's data. ValueError where these are not the data of the run."""
    from nbhelpers import dialogues  # reads tables of many kinds, which no other report needs

    config = run.config
    columns = {name: config.get(name) for name in ("dialogue_column", "label_column")}
    kinds = {"kind": config.get("label_kind", "auto"), "several": config.get("several", "refuse")}
    found = dialogues.read(config["data"], **columns, **kinds)
    if found.sha256 != run.result["data"].get("sha256"):
        raise ValueError(f"{config['data']!r} has changed since the run: put the file back, or run it again")
    return {str(row.id): row.text for row in found.rows}


def markdown_table(result: Mapping[str, Any]) -> str:
    """The entries as a table for a README: the headline with its interval, F1, written answers, memory, speed."""
    head = result["headline"]
    names = ["model", "precision", MEASURE_NAMES.get(head, head), "top-5", "F1 (macro)", "no valid answer"]
    names += ["peak memory", "dialogues/s"]
    lines = []
    for entry in ordered(result).values():
        memory, performance = entry.get("memory") or {}, entry.get("performance") or {}
        answered, speed = entry.get("no_valid_answer"), performance.get("dialogues_per_second")
        peak = memory.get("peak_bytes")
        lines.append(
            [
                *(full_name(entry), entry.get("precision") or tables.NONE),
                *(tables.share(entry.get(head), interval(entry, head)), tables.share(entry.get("top_5_accuracy"))),
                tables.share(entry.get("macro_f1")),
                tables.NONE if answered is None else f"{answered} of {entry['n_samples']}",
                tables.gigabytes(peak) if peak else tables.NONE,
                tables.number(speed),
            ]
        )
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(_in_cell(cell) for cell in row) + " |" for row in rows) + "\n"


def _in_cell(said: str) -> str:
    """Nobody's text ends a cell or begins a tag."""
    return " ".join(said.replace("|", "/").replace("<", "&lt;").split())
