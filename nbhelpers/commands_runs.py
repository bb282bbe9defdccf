"""What do the commands of `nbhelpers runs` do? Look at runs of any kind; exit codes and --json as in commands.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from nbhelpers.commands import Json, carry_out

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="run directory, JSON log, or folder with runs in it")]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="run directories, or folders with runs in them")]
Text = Annotated[bool, typer.Option("--include-text", help="also prompts, notes and other texts, not their sha256")]
Columns = Annotated[str | None, typer.Option(help="columns, separated by commas: config fields and metrics")]
CLEAR = "\x1b[H\x1b[2J"
LIVE = ("run", "kind", "status", "steps", "train_loss", "val_loss", "tokens_per_sec", "seconds")


def runs_list() -> Callable:
    def command(folders: Folders, json: Json = False) -> None:
        def work() -> dict:
            from nbhelpers.analysis import ExperimentAnalyzer

            analyzer = ExperimentAnalyzer(folders)
            runs = analyzer.load_all()
            rows = [
                {
                    "run": run.run_id,
                    "name": run.name,
                    "kind": run.kind,
                    "status": run.status,
                    "created": run.created,
                    "seconds": run.seconds,
                    "folder": str(run.folder),
                }
                for run in runs
            ]
            return {"runs": rows, "problems": analyzer.problems}

        carry_out(work, _show_rows, json)

    return command


def _show_rows(found: dict) -> str:
    from nbhelpers.tables import aligned

    return "\n".join([aligned(found["runs"]), *(f"note: {problem}" for problem in found["problems"])])


def runs_show() -> Callable:
    def command(folder: Folder, json: Json = False) -> None:
        carry_out(lambda: describe(folder), _show_run, json)

    return command


def describe(folder: Path) -> dict[str, Any]:
    """One run whole: who, how, what it measured. ValueError where `folder` is not one run that can be read."""
    from nbhelpers.collection import Experiment, read_log
    from nbhelpers.runs import read_run

    run = read_log(folder) if folder.is_file() else Experiment(**vars(read_run(folder)))
    result = run.result or {}
    errors = [event for event in run.events if event.get("kind") == "error"]
    return {
        "run": run.run_id,
        "name": run.name,
        "kind": run.kind,
        "status": run.status,
        "created": run.created,
        "attempts": len(run.manifest.get("attempts", [])),
        "torn_lines": run.torn_lines,
        "verdict": result.get("verdict"),
        "failed": [fact["says"] for fact in result.get("facts") or [] if not fact.get("ok")],
        "failure": f"{errors[-1].get('type')}: {errors[-1].get('message')}" if errors else None,
        "config": run.config,
        "metrics": run.numbers,
    }


def _show_run(found: dict) -> str:
    from nbhelpers.collection import flat
    from nbhelpers.tables import shown

    head = ("run", "name", "kind", "status", "created", "attempts", "torn_lines", "verdict", "failure")
    lines = [f"{key:<12}{shown(found[key])}" for key in head if found[key] not in (None, 0)]
    lines += [f"FAILED      {text}" for text in found["failed"]]
    for title, values in (("config", flat(found["config"])), ("metrics", found["metrics"])):
        width = max(map(len, values), default=0)
        rows = [f"  {key:<{width}}  {shown(value)}" for key, value in values.items() if value is not None]
        lines += ["", title, *rows]
    return "\n".join(lines)


def runs_compare() -> Callable:
    def command(
        folders: Folders,
        columns: Columns = None,
        metric: Annotated[str | None, typer.Option(help="what decides; None = by what the runs hold")] = None,
        figures: Annotated[Path | None, typer.Option(help="folder for figures of these runs, as SVG and PNG")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import predictions
            from nbhelpers.analysis import ExperimentAnalyzer

            analyzer = ExperimentAnalyzer(folders)
            chosen = [word.strip() for word in columns.split(",")] if columns else None
            by = metric or analyzer.headline()
            groups = analyzer.seed_groups(by) if by else []
            best = analyzer.get_best_experiment(by) if by else None
            paired, unpaired = predictions.compare_runs([run.folder for run in analyzer.load_all()])
            return {
                "runs": analyzer.get_comparison_table(chosen),
                "metric": by,
                "best": {"run": best[0], "value": best[1]} if best else None,
                "seeds": [
                    {"setting": group.differs, **vars(group.interval), "runs": group.run_ids} for group in groups
                ],
                "paired": paired,
                "figures": _draw(analyzer, figures) if figures else [],
                "problems": [*analyzer.problems, *unpaired],
            }

        carry_out(work, _show_comparison, json)

    return command


def _show_comparison(found: dict) -> str:
    from nbhelpers.stats import Interval
    from nbhelpers.tables import shown

    lines = [_show_rows(found | {"problems": []})]
    if found["best"]:
        lines += ["", f"best {found['metric']}: {shown(found['best']['value'])} ({found['best']['run']})"]
    several = [group for group in found["seeds"] if group["n"] > 1]
    for group in several:
        said = ", ".join(f"{key} {shown(value)}" for key, value in group["setting"].items()) or "all runs"
        lines.append(f"  {said}: {Interval(**{key: group[key] for key in Interval.__dataclass_fields__})}")
    lines += [_show_paired(test) for test in found["paired"]]
    lines += [f"figure {path}" for path in found["figures"]]
    return "\n".join([*lines, *(f"note: {problem}" for problem in found["problems"])])


def _show_paired(test: dict) -> str:
    from nbhelpers.stats import Interval

    a, b = (Path(test[side]).name for side in ("a_run", "b_run"))
    said = f"{test['measure']} of {a} - {b}: {Interval(**test['difference'])}"
    if "mcnemar_p" not in test:  # a perplexity: no document is right or wrong
        return said
    return f"{said}, right in one alone {test['only_a']} and {test['only_b']}, McNemar p = {test['mcnemar_p']:.3g}"


def _draw(analyzer, folder: Path) -> list[str]:
    """Every figure that these runs can fill, as vector and as picture; what cannot be drawn is said on stderr."""
    from nbhelpers import analysis_plots, plots
    from nbhelpers.records import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in analysis_plots.FIGURES.items():
        try:
            figure = draw(analyzer)
        except (ValueError, LookupError) as error:
            typer.echo(f"{name}: {error}", err=True)
            continue
        write_atomic(folder / f"{name}.svg", plots.svg(figure))
        write_atomic(folder / f"{name}.png", plots.png(figure))
        paths += [str(folder / f"{name}.svg"), str(folder / f"{name}.png")]
    return paths


def runs_export() -> Callable:
    def command(
        folders: Folders,
        format: Annotated[str, typer.Option(help="csv or json")] = "csv",
        form: Annotated[str, typer.Option(help="of csv: wide (a row a run) or long (a row a logged value)")] = "wide",
        out: Annotated[Path | None, typer.Option(help="file to write; None = stdout")] = None,
        include_text: Text = False,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers.analysis import ExperimentAnalyzer
            from nbhelpers.records import write_atomic
            from nbhelpers.registry import unknown

            if format not in ("csv", "json"):
                raise LookupError(unknown("format", format, ["csv", "json"]))
            analyzer = ExperimentAnalyzer(folders)
            runs = len(analyzer.load_all())
            content = analyzer.csv(form, include_text) if format == "csv" else analyzer.json(include_text)
            if out:
                write_atomic(out, content)
            found = {"format": format, "runs": runs, "problems": analyzer.problems}
            return found | ({"path": str(out)} if out else {"content": content})

        carry_out(work, _show_export, json)

    return command


def _show_export(found: dict) -> str:
    for problem in found["problems"]:
        typer.echo(f"note: {problem}", err=True)
    if "content" in found:
        return found["content"].rstrip("\n")
    return f"{found['runs']} runs in {found['path']}"


def runs_watch() -> Callable:
    def command(
        folders: Folders,
        once: Annotated[bool, typer.Option("--once", help="print the table once")] = False,
        interval: Annotated[float, typer.Option(help="seconds between looks", min=0.1)] = 2.0,
        json: Json = False,
    ) -> None:
        screen = sys.stderr if json else sys.stdout
        carry_out(lambda: watch(folders, once, interval, screen), lambda found: found["line"], json)

    return command


def watch(folders: list[Path], once: bool, interval: float, screen: TextIO) -> dict[str, Any]:
    """Show the table of runs on `screen` again whenever it changes, until no run is running; Ctrl-C ends it too."""
    from nbhelpers.analysis import ExperimentAnalyzer
    from nbhelpers.tables import aligned, counted

    analyzer, last = ExperimentAnalyzer(folders), None
    while True:
        runs = analyzer.load_all()
        rows = [live_row(run) for run in runs]
        text = aligned([{key: row[key] for key in LIVE} for row in rows])
        if text != last:
            screen.write((CLEAR if screen.isatty() and not once else "") + text + "\n")
            screen.flush()
        last = text
        if once or (rows and all(row["status"] != "running" for row in rows)):
            line = counted(run.status for run in runs) or "no runs"
            return {"runs": rows, "line": line, "problems": analyzer.problems}
        time.sleep(interval)


def live_row(run) -> dict[str, Any]:
    """Where a run stands: its newest stage, step and measures."""
    stage = run.metrics[-1].get("stage") if run.metrics else None
    measures = {name: values[-1] for (at, name), (_, values) in run.curves.items() if at == stage}
    row = {"run": run.run_id, "kind": run.kind, "status": run.status, "stage": stage, "seconds": run.seconds}
    row["steps"] = run.metrics[-1]["iteration"] if run.metrics else None
    return row | {name: measures.get(name) for name in ("train_loss", "val_loss", "tokens_per_sec")}


def runs_log() -> Callable:
    def command(
        folder: Folder,
        metric: Annotated[str | None, typer.Option(help="what decides the best; None = by what the runs hold")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import journal

            return journal.write_journal(folder, metric)

        carry_out(work, _show_log, json)

    return command


def _show_log(found: dict) -> str:
    counts = f"{found['completed']} completed, {found['unfinished']} not finished, {found['planned']} planned"
    return "\n".join([f"{counts}: {found['path']}", *(f"note: {problem}" for problem in found["problems"])])
