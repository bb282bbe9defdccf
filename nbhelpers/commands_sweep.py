"""What do the commands of `nbhelpers sweep` do? Plan, run, status and retry of a grid; exit codes as in commands.py."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nbhelpers.commands import Json, Violation, carry_out
from nbhelpers.tracking import Interrupted

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="plan file, YAML or JSON")]
Budget = Annotated[str | None, typer.Option(help="time to use, such as 30m, 1h30m, 90s; None = all")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder of the sweep")]


class FailedJobs(Violation):
    """The sweep was carried out, but jobs of it failed."""

    def __init__(self, result: dict) -> None:
        classes = ", ".join(f"{count} {name}" for name, count in result["failed_by_class"].items() if count)
        RuntimeError.__init__(self, f"{result['failed']} of {result['planned']} jobs failed ({classes})")
        self.result = result


def sweep_plan() -> Callable:
    def command(
        plan: PlanFile,
        out: Annotated[Path | None, typer.Option(help="lay the plan down in this folder, for workers")] = None,
        calibrate: Annotated[bool, typer.Option(help="time short pilots first, a minute a model")] = False,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import sweep, workers

            found = sweep.preview(plan, _measured(plan) if calibrate else None)
            return found if out is None else found | {"probe": workers.lay_down(plan, out), "folder": str(out)}

        carry_out(work, show_plan, json)

    return command


def _measured(plan: Path) -> dict[str, float | None]:
    from nbhelpers import sweep_pace

    return sweep_pace.measure(plan, progress=lambda now: sys.stderr.write(f"{now['model']} on {now['task']}\n"))


def sweep_prefetch() -> Callable:
    def command(
        plan: PlanFile,
        out: Annotated[Path | None, typer.Option(help="write the record of what came, JSON")] = None,
        check: Annotated[Path | None, typer.Option(metavar="RECORD", help="compare with a record made there")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import prefetch, records

            there = None if check is None else prefetch.read(check)
            found = prefetch.fetch(plan, lambda now: sys.stderr.write(f"{now['stage']}: {now['name']}\n"))
            if out is not None:
                records.write_json(out, found)
            if there is not None:
                differs = prefetch.differences(found, there)
                found["facts"] = [{"name": line, "ok": False} for line in differs]
                if differs:
                    raise Violation(found)
            return found

        carry_out(work, show_prefetch, json)

    return command


def show_prefetch(found: dict[str, Any]) -> str:
    """A line a model and a data set, with the beginning of its hash."""
    lines = [
        f"{name}: {one['source']}{' at ' + one['revision'] if one['revision'] else ''}, {len(one['files'])} files, "
        f"{_gigabytes(one['bytes'])}"
        for name, one in found["models"].items()
    ]
    lines += [f"{what}: sha256 {sha256[:16]}" for what, sha256 in found["data"].items()]
    return "\n".join([*lines, "nodes without a network take these with the same HF_HOME and HF_HUB_OFFLINE=1"])


def sweep_run() -> Callable:
    def command(
        plan: PlanFile,
        out: Annotated[Path, typer.Option(help="folder of the sweep; one that holds it already is continued")],
        budget: Budget = None,
        workers: Annotated[int, typer.Option(min=1, help="processes, or actors of Ray, that share the jobs")] = 1,
        engine: Annotated[Literal["local", "ray"], typer.Option(help="local: processes of this machine")] = "local",
        address: Annotated[
            str | None, typer.Option(help="a Ray cluster: auto, host:port, ray://host:port; None = one made here")
        ] = None,
        only: Annotated[int | None, typer.Option(help="the job of this row alone, counted from 1")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import sweep
            from nbhelpers import workers as several

            if address is not None and engine != "ray":
                raise ValueError(f"address is of the engine ray, got {address!r}: add --engine ray, or leave it out")
            if engine == "ray":
                from nbhelpers import ray_engine

                if only is not None:
                    raise ValueError(f"only is one job of this process, got engine ray and only {only}")
                more = {"address": address, "progress": say_progress}
                return _checked(ray_engine.run(plan, out, workers, budget, **more))
            if workers > 1 and only is not None:
                raise ValueError(f"only is one job, got workers {workers}: leave one of them out")
            if workers > 1:
                return _checked(several.run(plan, out, workers, budget))
            return _checked(sweep.run(plan, out, budget, progress=say_progress, only=only))

        carry_out(work, show_coverage, json)

    return command


def sweep_worker() -> Callable:
    def command(
        plan: PlanFile,
        folder: Annotated[Path, typer.Option(help="folder that the plan was laid down in, shared by all workers")],
        budget: Budget = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import workers

            return _checked(workers.work(plan, folder, budget, progress=say_progress))

        carry_out(work, show_coverage, json)

    return command


def _checked(result: dict) -> dict:
    if result["ended"] == "stopped":
        raise Interrupted(f"interrupted: {show_coverage(result)}; run the same command again to go on")
    if result["failed"]:
        raise FailedJobs(result)
    return result


def sweep_status() -> Callable:
    def command(folder: Folder, json: Json = False) -> None:
        def work() -> dict:
            from nbhelpers import sweep, workers

            return sweep.status(folder) | {"workers": workers.present(folder)}

        carry_out(work, show_status, json)

    return command


def sweep_retry() -> Callable:
    def command(
        folder: Folder,
        failure: Annotated[
            list[str] | None,
            typer.Option("--class", help="only these: out of memory, diverged, bad input, error; may be repeated"),
        ] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import sweep

            return {"retried": sweep.retry(folder, failure or []), "folder": str(folder)}

        carry_out(work, lambda found: f"{len(found['retried'])} jobs are planned again: sweep run does them", json)

    return command


def show_plan(found: dict[str, Any]) -> str:
    """Counts, the size of each axis, time, and the first jobs."""
    from nbhelpers.durations import in_words

    axes = " x ".join(f"{count} {name}" for name, count in found["axes"].items())
    lines = [f"{found['rows']} rows ({axes}) -> {found['jobs']} jobs, {found['aliases']} aliases"]
    if price := found.get("price"):
        counts = (name for name in price if name not in ("downloads", "disk_bytes"))
        lines.append(", ".join(f"{price[name]:,} {name if price[name] != 1 else name[:-1]}" for name in counts))
        lines += [f"download {name}: {_gigabytes(size)}" for name, size in price["downloads"].items()]
        lines.append(f"disk, about: {_gigabytes(price['disk_bytes'])} of runs, masks and answers")
    if search := found.get("search"):
        where = ", ".join(search["space"])
        lines = [
            f"{search['trials']} trials by {search['sampler']} over {where}: {search['direction']} {search['metric']}"
        ]
    if found["estimated_hours"] is not None:
        how = "by pilots timed" if found.get("calibrated") else "by an estimate at this machine's speed"
        lines.append(f"about {in_words(3600 * found['estimated_hours'])} {how}{_by_workers(found, in_words)}")
    lines += [f"{count} jobs could not be estimated: {why}" for why, count in found["why_not_estimated"].items()]
    lines += found["notes"]
    if "probe" in found:
        lines.append(f"laid down in {found['folder']} (probe {found['probe']['token']}): sweep worker PLAN --folder it")
    if not found["order"]:
        return "\n".join(lines)
    return "\n".join([*lines, "first:", *(f"  {job['job']}  {job['name']}" for job in found["order"][:5])])


def _by_workers(found: dict[str, Any], in_words: Callable[[float], str]) -> str:
    hours = {count: value for count, value in found.get("hours_by_workers", {}).items() if count != "1"}
    said = ", ".join(f"{in_words(3600 * value)} by {count}" for count, value in hours.items())
    return f"; with a machine or GPU each, {said} workers" if said else ""


def _gigabytes(size: int | None) -> str:
    if size is None:
        return "size not known before"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def show_coverage(found: dict[str, Any]) -> str:
    """One line: planned, done, failed by class, stopped by a search, running, missing, aliases."""
    failed = ", ".join(f"{count} {name}" for name, count in found["failed_by_class"].items() if count)
    parts = [f"{found['done']} of {found['planned']} jobs done", f"{found['failed']} failed"]
    parts[1] += f" ({failed})" if failed else ""
    parts += [f"{found['pruned']} stopped by the search"] if found["pruned"] else []
    parts += [f"{found['running']} running", f"{found['missing']} missing"]
    parts += [f"{found[name]} {name.replace('_', ' ')}" for name in ("aliases", "no_longer_planned") if found[name]]
    return ", ".join(parts) + ("; the budget is used up" if found.get("ended") == "budget" else "")


def show_status(found: dict[str, Any]) -> str:
    """The coverage, the best trial of a search, then a line a job that is not simply done or planned."""
    rows = [job for job in found["jobs"] if job["status"] not in ("finished", "planned")]
    said = [f"{row['job']}  {row['status']:<11}  {row['name']}" + _why(row) for row in rows]
    hosts = Counter(worker["host"] for worker in found["workers"])
    at_work = [f"workers: {', '.join(f'{count} on {host}' for host, count in hosts.items())}"] if hosts else []
    return "\n".join([show_coverage(found), *at_work, *show_best(found), *said])


def show_best(found: dict[str, Any]) -> list[str]:
    """Two lines of the best trial of a search so far, one where none came to its end, none of a grid."""
    if "best" not in found:
        return []
    if (best := found["best"]) is None:
        return ["best: no trial came to its end yet"]
    values = ", ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in best["values"].items())
    return [
        f"best: trial {best['trial']}, {best['metric']} {best['value']:.6g} with {values}",
        f"  in {best['run_dir']}",
    ]


def _why(row: dict[str, Any]) -> str:
    return f"  {row['failure']}: {row['error']}" if row["failure"] else ""


def say_progress(now: dict[str, Any]) -> None:
    """A line on stderr when a job has ended."""
    if now["stage"] != "job ended":
        return
    from nbhelpers.durations import in_words  # brings torch, which the other commands do without

    left = "" if now["seconds_left"] is None else f", about {in_words(now['seconds_left'])} left"
    what = f"{now['failure']}: {now['error']}" if now.get("failure") else now["status"]
    sys.stderr.write(f"{now['done']}/{now['total']} {now['name']}: {what}{left}\n")


def sweep_report() -> Callable:
    def command(
        folder: Folder,
        out: Annotated[Path | None, typer.Option(help="folder of the report; None = DIR/report")] = None,
        tolerance: Annotated[
            float, typer.Option(help="points below the dense model of the same tuning that still pass")
        ] = 0.02,
        external: Annotated[Path | None, typer.Option(metavar="CSV", help="a table of results to compare with")] = None,
        columns: Annotated[
            str | None, typer.Option(help="what its columns are: THEIRS=OURS,... with OURS model, task, value, ...")
        ] = None,
        protocol: Annotated[
            str | None, typer.Option(help="how it was measured (shots, split, metric), where no column says so")
        ] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import external_results, sparsity_report

            if external is None and (columns or protocol):
                raise ValueError("columns and protocol are of a table to compare with: name it with --external CSV")
            table = None if external is None else external_results.read(external, columns, protocol)
            found = sparsity_report.write(folder, out, tolerance, table)
            if found["facts_failed"]:
                raise Violation(found)
            return found

        carry_out(work, show_report, json)

    return command


def show_report(found: dict[str, Any]) -> str:
    """The headline, a line each, and where the files are."""
    lines = [f"{found['finished']} of {found['rows']} rows finished, {found['facts_failed']} runs with a false fact"]
    told = [one for one in found["headline"] if not one["cannot_tell"]]
    if told:
        lines.append(f"highest sparsity within {found['tolerance']:g} of {found['judged_by']}:")
    for one in told:
        where = ("none" if one["known"] else "?") if one["sparsity"] is None else f"{one['sparsity']:g}"
        share = "" if one["measured_sparsity"] is None else f", {100 * one['measured_sparsity']:.3g} % of weights"
        of = f"(of {one['sparsity_of']}{'' if one['sparsity_of'] == 'weights' else share})"
        lines.append(f"  {where:>5}  {one['model']} {one['task']} {one['method']} {one['mode']} {of}")
    untold = (one for one in found["headline"] if one["cannot_tell"])
    lines += dict.fromkeys(f"{one['model']} on {one['task']}: {one['cannot_tell']}" for one in untold)
    if compared := found["compared"]:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in compared.items())
        lines.append(f"beside the table: {counts}")
    return "\n".join([*lines, *found["files"]])


QUICK_PLAN = {
    "kind": "sparsity",
    "name": "quick test",
    "base": {"model": "tiny-llama", "task": "hellaswag", "data": "bundled", "limit": 60, "steps": 15},
    "axes": {"sparsity": [0, 0.5], "mode": ["sparse_to_dense", "sparse_to_sparse"]},
    "aliases": [{"when": {"sparsity": 0}, "ignore": ["mode"]}],
}


def quick_test() -> Callable:
    def command(
        out: Annotated[Path | None, typer.Option(help="folder to keep the runs in; None = none is kept")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            import tempfile

            from nbhelpers import sweep

            with tempfile.TemporaryDirectory(prefix="nbhelpers-") as scratch:
                folder = out or Path(scratch) / "sweep"
                result = sweep.run(QUICK_PLAN, folder, progress=say_progress)
                if result["ended"] == "stopped":
                    raise Interrupted("interrupted")
                if result["failed"]:
                    errors = [job["error"] for job in sweep.status(folder)["jobs"] if job["error"]]
                    raise RuntimeError(f"{result['failed']} of {result['planned']} jobs failed: {errors[0]}")
                rows = sweep.results(folder)
            keys = ("sparsity", "mode", "dense", "masked", "tuned", "tuned_low", "tuned_high", "merge_violations")
            found = [{name: row.get(name) for name in (*keys, "all_facts_hold")} for row in rows if not row["alias"]]
            result = {"jobs": result["done"], "seconds": result["seconds"], "metric": rows[0]["metric"], "rows": found}
            result["facts"] = [
                {"name": f"every fact of {row['mode']} at sparsity {row['sparsity']:g}", "ok": row["all_facts_hold"]}
                for row in found
            ]
            if not all(fact["ok"] for fact in result["facts"]):
                raise Violation(result)
            return result

        carry_out(work, show_quick_test, json)

    return command


def show_quick_test(found: dict[str, Any]) -> str:
    """A line a cell, and whether everything that was checked holds."""
    lines = [f"{'sparsity':>8}  {'mode':<16}  {'as it is':>8}  {'masked':>8}  {'tuned':>8}  95 % over documents"]
    for row in found["rows"]:
        lines.append(
            f"{row['sparsity']:>8g}  {row['mode']:<16}  {row['dense']:>8.3f}  {row['masked']:>8.3f}  "
            f"{row['tuned']:>8.3f}  [{row['tuned_low']:.3f}, {row['tuned_high']:.3f}]"
        )
    lines.append(f"{found['metric']} on 60 rows that this project generated; 15 steps are no training, only a test")
    held = all(fact["ok"] for fact in found["facts"])
    said = "OK     every checked fact holds" if held else "FAILED a checked fact does not hold"
    return "\n".join([*lines, f"{said} in {found['jobs']} runs, {found['seconds']:.0f} seconds"])
