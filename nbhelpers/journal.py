"""What was done, what is still planned, what was best? EXPERIMENT_LOG.md, refreshed around notes written by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers.analysis import ExperimentAnalyzer, SeedGroup, lower_is_better_by_name, seed_groups
from nbhelpers.collection import Experiment, flat
from nbhelpers.records import canonical_json, plain, read_json, read_lines, write_atomic
from nbhelpers.tables import counted, shown, withheld

FILE = "EXPERIMENT_LOG.md"
SECTIONS = ("completed", "not finished", "planned", "best per group")
HEAD = (
    "# Experiment log\n\nWhat stands between the marks is written anew by `nbhelpers runs log`; "
    "everything else in this file is kept.\n"
)
FOOT = "## Notes\n\n(yours)\n"


def write_journal(folder: str | os.PathLike, metric: str | None = None) -> dict[str, Any]:
    """Write or refresh EXPERIMENT_LOG.md in `folder`; returns its path and how many runs stand in each section.

    metric: what decides the best; None = by what the runs hold. Texts outside the marks stay as they are, byte for
    byte. ValueError where marks are torn apart: then nothing is written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is not a folder: name one with runs in it")
    analyzer = ExperimentAnalyzer(folder)
    runs = analyzer.load_all()
    done = [run for run in runs if run.status == "finished"]
    rest = [run for run in runs if run.status != "finished"]
    planned = missing_jobs(folder, runs)
    headline = metric or analyzer.headline()
    best = best_groups(done, headline) if headline else []
    parts = {
        "completed": _completed(analyzer.filter(status="finished")),
        "not finished": _markdown([{"run": run.run_id, "status": run.status} for run in rest], "none"),
        "planned": _markdown([_planned_row(job) for job in planned], "nothing that is missing"),
        "best per group": _best(best, headline),
    }
    if analyzer.problems:
        parts["not finished"] += "\n\n" + "\n".join(f"- {_cell(problem)}" for problem in analyzer.problems)
    path = folder / FILE
    old = path.read_text(encoding="utf-8") if path.exists() else None
    write_atomic(path, merged(old, parts))
    return {
        "path": str(path),
        "completed": len(done),
        "unfinished": len(rest),
        "planned": len(planned),
        "metric": headline,
        "best": [{"group": name, "runs": group.run_ids, "value": group.interval.mean} for name, group in best],
        "problems": analyzer.problems,
    }


def merged(old: str | None, parts: Mapping[str, str]) -> str:
    """`old` with each marked section replaced, or added at the end where it is not there yet."""
    text = old
    if text is None:
        text = HEAD + "".join(f"\n{_begin(name)}\n{_end(name)}\n" for name in parts) + f"\n{FOOT}"
    for name, content in parts.items():
        begin, end = _begin(name), _end(name)
        if text.count(begin) > 1 or text.count(begin) != text.count(end) or text.find(end) < text.find(begin):
            raise ValueError(f"the marks of section {name!r} in {FILE} are torn apart: put back '{begin}' and '{end}'")
        block = f"{begin}\n## {name[:1].upper()}{name[1:]}\n\n{content}\n{end}"
        if begin in text:
            before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
            text = before + block + after
        else:
            text = text + ("" if text.endswith("\n") else "\n") + f"\n{block}\n"
    return text


def _begin(name: str) -> str:
    return f"<!-- nbhelpers: {name} -->"


def _end(name: str) -> str:
    return f"<!-- nbhelpers: end of {name} -->"


def missing_jobs(folder: Path, runs: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Jobs of a sweep's plan.json in or around these folders that no finished run has done."""
    places = {folder, *(run.folder.parent for run in runs), *(run.folder.parent.parent for run in runs)}
    top = folder.resolve()
    inside = {place.resolve() for place in places}
    plans = [place / "plan.json" for place in sorted(inside) if place == top.parent or place.is_relative_to(top)]
    missing = []
    for path in plans:
        done = [run for run in runs if run.status == "finished" and run.folder.resolve().is_relative_to(path.parent)]
        missing += [job for job in _jobs(path) if not any(_did(run, job) for run in done)]
    return missing


def _jobs(path: Path) -> list[dict[str, Any]]:
    """The jobs of a plan as dicts with an `id`; a plan that cannot be read plans nothing."""
    try:
        jobs = read_json(path)["jobs"]
        stopped = {line.get("job") for line in read_lines(path.with_name("ledger.jsonl"))[0] if _by_search(line)}
    except (OSError, ValueError, LookupError, TypeError):
        return []
    if isinstance(jobs, dict):
        jobs = [{"id": key, **job} for key, job in jobs.items() if isinstance(job, dict) and key not in stopped]
    return [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []


def _by_search(line: Mapping[str, Any]) -> bool:
    """Whether a line of a sweep's ledger says that a search stopped the job for good."""
    return line.get("event") == "ended" and line.get("status") == "pruned"


def _did(run: Experiment, job: Mapping[str, Any]) -> bool:
    """By the name of the run's folder (`<job id>` or `<job id>-<try>`), else by the config that was asked for."""
    key = job.get("id") or job.get("job") or job.get("job_id")
    if key:
        return run.folder.name == key or run.folder.name.rpartition("-")[0] == key
    config = flat(job.get("config") or {})
    return bool(config) and all(_same(flat(run.config).get(name), value) for name, value in config.items())


def _same(a: Any, b: Any) -> bool:
    return canonical_json(plain([a])) == canonical_json(plain([b]))


def _planned_row(job: Mapping[str, Any]) -> dict[str, Any]:
    config = flat(job.get("values") or job.get("config") or {})
    said = ", ".join(f"{key} {shown(withheld(key, value))}" for key, value in config.items() if value is not None)
    return {"job": job.get("name") or str(job.get("id") or "")[:12], "config": said}


def _completed(analyzer: ExperimentAnalyzer) -> str:
    rows = analyzer.get_comparison_table()
    kept = [{k: v if k == "run" else withheld(k, v) for k, v in row.items() if k != "status"} for row in rows]
    return _markdown(kept, "no run yet")


def best_groups(runs: Sequence[Experiment], metric: str) -> list[tuple[str, SeedGroup]]:
    """(group, its best setting) for each kind and model, by the mean over seeds."""
    lower = lower_is_better_by_name(metric)
    found: dict[str, SeedGroup] = {}
    by_id = {run.run_id: run for run in runs}
    for group in seed_groups(runs, metric):
        run = by_id[group.run_ids[0]]
        name = " ".join(filter(None, (run.kind, str(run.config.get("model") or ""))))
        known = found.get(name)
        if known is None or (group.interval.mean < known.interval.mean) is lower:
            found[name] = group
    return list(found.items())


def _best(best: Sequence[tuple[str, SeedGroup]], metric: str | None) -> str:
    rows = []
    for name, group in best:
        said = ", ".join(f"{key} {shown(withheld(key, value))}" for key, value in group.differs.items()) or "-"
        rows.append(
            {"group": name, "setting": said, str(metric): str(group.interval), "runs": ", ".join(group.run_ids)}
        )
    return _markdown(rows, "nothing to compare yet")


def _markdown(rows: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    if not rows:
        return otherwise
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(shown(row[column])) for column in columns] for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    status = counted(str(row["status"]) for row in rows) if "status" in columns else ""
    return f"{table}\n\n{status}" if status else table


def _cell(text: str) -> str:
    """Text that can break neither the table nor the marks."""
    return " ".join(text.replace("|", "\\|").replace("<!--", "&lt;!--").split())
