"""What is in this folder of runs? One self-contained page over whatever lies there; failed runs show no number."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment

from nbhelpers import comparison_report, comparison_tables, plots, plots_comparison, report, sparsity_report, verdicts
from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.collection import Experiment, flat
from nbhelpers.ledger import Ledger
from nbhelpers.records import write_atomic
from nbhelpers.redaction import Redactor
from nbhelpers.runs import read_run
from nbhelpers.tables import counted, shown, withheld

NAME = "report.html"
MOST_ROWS = 500  # runs in the tables
MOST_RUNS = 60  # runs with a part of their own, the newest
MOST_LETTERS = 300  # of an error
ALWAYS = ("model", "task")  # of a config, also where all runs of a kind have the same
MEASURES = {  # numbers of kinds that the comparison of runs does not show by itself, as people call them
    "n": "rows",
    "acc": "accuracy",
    "acc_norm": "accuracy (length-normalised)",
    "exact_match": "exact match",
    "answer/best_large/accuracy": "best large model",
    "answer/best_small/accuracy": "best small model",
    "answer/difference/mean": "small minus large",
}
RUN = """<p>{{ run.headline }}</p>
{% if run.error %}<p class="failed">{{ run.error }}</p>{% endif %}
{% if run.generated %}<p class="note">On text or rows that this project generated itself.</p>{% endif %}
{% if run.figure %}<div class="wide"><img{% if run.stages %} class="stages"{% endif %} alt="{{ run.headline }}" \
src="data:image/png;base64,{{ run.figure }}"></div>{% endif %}
{% if run.checks %}<ul>{% for check in run.checks %}<li{% if not check.ok %} class="failed"{% endif %}>\
{{ "holds" if check.ok else "FAILED" }}: {{ check.says }} <span class="note">({% for fact in check.seen %}\
{% if fact.model %}{{ fact.model }}: {% endif %}{{ fact.saw }}{% if not loop.last %}; {% endif %}{% endfor %})</span>\
</li>{% endfor %}</ul>{% endif %}
<p class="note">Folder: <code>{{ run.folder }}</code></p>"""

PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + report.STYLE
    + """
body { max-width: 62rem } p, li { overflow-wrap: anywhere } .wide { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .86rem; white-space: nowrap }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top }
th { color: #555; font-weight: 600 } td.n { text-align: right; font-variant-numeric: tabular-nums }
@media (max-width: 600px) { img.stages { max-width: none; width: 36rem } }
section { border-top: 1px solid #e4e4e4; margin-top: 1.6rem } section h3 { font-size: 1rem; margin: .9rem 0 .2rem }
</style></head><body><h1>{{ title }}</h1>
<p>{{ covered }}</p>
{% if generated %}<p class="note">{{ generated }} on text or rows that this project generated itself.</p>{% endif %}
{% for kind in kinds %}<h2>{{ kind.name }}</h2>
<div class="wide"><table><tr>{% for name in kind.names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in kind.rows %}<tr>{% for cell in row %}<td{% if loop.index0 >= kind.numbers %} class="n"{% endif %}>\
{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% if kind.more %}<p class="note">{{ kind.more }} earlier \
{{ "one is" if kind.more == 1 else "ones are" }} not shown.</p>{% endif %}
{% endfor %}
<h2>Run by run</h2>{% if left_out %}<p class="note">The newest {{ runs|length }}; {{ left_out }} earlier \
{{ "one stands" if left_out == 1 else "ones stand" }} in the tables alone.</p>{% endif %}
{% for run in runs %}<section><h3>{{ run.title }}</h3>"""
    + RUN
    + """{% if run.see %}<p class="note"><a href="{{ run.see }}">its own report</a></p>{% endif %}</section>{% endfor %}
{% if problems %}<h2>What could not be read</h2><ul>{% for line in problems %}<li>{{ line }}</li>{% endfor %}</ul>\
{% endif %}</body></html>
"""
)


def write(folder: str | Path) -> Path:
    """Write the report of a run directory or of a folder of runs into it; returns the page's path.

    A comparison and a sweep of sparsities have reports of their own kind. ValueError where no run lies there.
    """
    folder = Path(folder)
    if (folder / "manifest.json").is_file() and read_run(folder).kind == "comparison":
        return comparison_report.write(folder)
    if (folder / "plan.json").is_file() and Ledger(folder).plan["kind"] == "sparsity":
        return next(Path(file) for file in sparsity_report.write(folder)["files"] if file.endswith(NAME))
    analyzer = ExperimentAnalyzer(folder)
    if not analyzer.load_all():
        said = "; ".join(analyzer.problems[:3])
        raise ValueError(
            f"'{folder}' holds no runs{f' that can be read ({said})' if said else ''}: name a run directory, or a "
            "folder with run directories in it"
        )
    path = folder.with_suffix(".html") if folder.is_file() else folder / NAME
    write_atomic(path, page(analyzer, folder))
    return path


def page(analyzer: ExperimentAnalyzer, folder: Path) -> str:
    """The page as text. folder: where it will lie, for the links to reports of single runs."""
    runs = analyzer.experiments
    kinds = dict.fromkeys(run.kind for run in runs)
    own = sum(run.generated for run in runs)
    newest = runs[::-1][:MOST_RUNS]
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=f"Runs in {folder.resolve().name}",
            covered=f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {counted(run.status for run in runs)}.",
            generated=f"{own} of {len(runs)} {'runs is' if own == 1 else 'runs are'}" if own else "",
            kinds=[_table(analyzer.filter(kind=kind), kind) for kind in kinds],
            runs=[_part(run, analyzer.label(run), folder) for run in newest],
            left_out=len(runs) - len(newest),
            problems=[Redactor().text(line) for line in analyzer.problems],
        )
    )


def _table(view: ExperimentAnalyzer, kind: str) -> dict[str, Any]:
    """Runs of one kind, the newest first: what sets them apart, and the numbers of those that finished."""
    rows, runs = _rows(view)[::-1], view.experiments[::-1]
    measures = set(view.metrics()) - {name for run in runs for name in run.config}
    names = [name for name in rows[0] if name not in measures] + [name for name in rows[0] if name in measures]
    filled = [
        name for name in names
        if name not in measures or any(run.status == "finished" and row[name] is not None
                                       for row, run in zip(rows, runs, strict=True))
    ]  # fmt: skip
    cells = [
        [_cell(name, row[name], name in measures, run) for name in filled]
        for row, run in zip(rows[:MOST_ROWS], runs, strict=False)
    ]
    return {
        "name": kind.replace("_", " "),
        "names": [_named(name) for name in filled],
        "rows": cells,
        "numbers": sum(name not in measures for name in filled),
        "more": max(0, len(rows) - MOST_ROWS),
    }


def _rows(view: ExperimentAnalyzer) -> list[dict[str, Any]]:
    """What the comparison of runs shows, and what they are of and measured also where it is one run."""
    usual = [name for name in view.get_comparison_table()[0] if name != "run"]
    said = {name for run in view.experiments for name, value in flat(run.config).items() if isinstance(value, str)}
    there = set(view.metrics())
    first = [name for name in ("status", "kind") if name in usual]
    of = [name for name in ALWAYS if name in said]
    found = [name for name in MEASURES if name in there]
    return view.get_comparison_table(list(dict.fromkeys([*first, *of, *usual, *found])))


def _named(name: str) -> str:
    """`perplexity, fine-tuned` of fine_tuned/perplexity."""
    if name in MEASURES:
        return MEASURES[name]
    stage, _, measure = name.rpartition("/")
    said = measure.removesuffix("_percent").replace("_", " ") + (", %" if measure.endswith("_percent") else "")
    return said + (f", {stage.replace('fine_tuned', 'fine-tuned').replace('_', ' ')}" if stage else "")


def _cell(name: str, value: Any, measured: bool, run: Experiment) -> str:
    if measured:
        return shown(value) if run.status == "finished" else "-"
    if isinstance(value, float):
        return f"{value:g}"
    return shown(withheld(name, value)) if name != "run" else str(value)


def _part(run: Experiment, title: str, folder: Path) -> dict[str, Any]:
    found = report.run_entry(run)
    found |= {
        "checks": comparison_tables.checks(found["facts"], verdicts.name),
        "generated": run.result and run.generated,
    }
    found["stages"] = bool(found.get("figure"))
    if found.get("error"):
        found["error"] = Redactor().text(found["error"])[:MOST_LETTERS]
    if run.kind == "comparison" and run.result:
        found["figure"] = base64.b64encode(plots.png(plots_comparison.accuracy(run.result, narrow=True))).decode()
    own = run.folder / NAME
    see = own.relative_to(folder).as_posix() if own.is_file() and folder in own.parents else None
    return found | {"title": f"{title} ({run.kind.replace('_', ' ')}, {run.status})", "see": see}
