"""How do many runs read on a page? Coverage, runs at work, settings with bars, runs and differences as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.collection import flat
from nbhelpers.overview import Overview, counts
from nbhelpers.tables import shown, withheld

MOST_ROWS = 30  # runs in the table of runs
MOST_SETTINGS = 60  # rows in the table of settings
MOST_RUNNING = 6  # runs at work that get a line each
_templates = Environment(autoescape=True)
NOTE = _templates.from_string('<span class="nbh-note">{{ text }}</span>')
SETTINGS = _templates.from_string(
    '<table class="nbh-runs"><tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}'
    '<th class="nbh-right">{{ metric }}</th><th class="nbh-right">95 % interval</th><th class="nbh-right">seeds</th>'
    '<th class="nbh-barcell"></th></tr>'
    '{% for row in rows %}{% if row.section %}<tr class="nbh-part"><td colspan="{{ names|length + 4 }}">'
    '{{ row.section }}</td></tr>{% endif %}<tr{% if row.best %} class="nbh-best"{% endif %}>{% for cell in row.cells %}'
    '<td>{% if loop.first and row.color %}<span class="nbh-key" style="background:{{ row.color }}"></span>{% endif %}'
    '{{ cell }}</td>{% endfor %}<td class="nbh-right"><b>{{ row.mean }}</b></td>'
    '<td class="nbh-right nbh-note">{{ row.interval }}</td><td class="nbh-right">{{ row.seeds }}</td>'
    '<td class="nbh-barcell"><i style="width:{{ row.width }}%;background:{{ row.color or "#8a97a5" }}"></i></td></tr>'
    '{% endfor %}</table><span class="nbh-note">{{ note }}</span>'
)
ROWS = _templates.from_string(
    '<div class="nbh-wide"><table class="nbh-runs"><tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>'
    "{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>"
    '<span class="nbh-note">{{ note }}</span>'
)
COVERAGE = _templates.from_string(
    '<div class="nbh-cover"><i style="width:{{ done }}%"></i><i class="nbh-ran" style="width:{{ running }}%"></i>'
    '<i class="nbh-lost" style="width:{{ failed }}%"></i></div><span class="nbh-note">{{ text }}</span>'
)
STAMP = _templates.from_string('<div class="nbh-stamp">{{ text }}</div>')
REFUSED = _templates.from_string('<span class="nbh-note">this figure cannot be drawn here: {{ why }}</span>')
MISSING = _templates.from_string(
    '<details class="nbh-details"><summary>{{ why|length }} more figures need other runs</summary><dl>'
    "{% for name, text in why.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl></details>"
)


def coverage_html(found: Mapping[str, Any] | None) -> str:
    """A bar and a line: how much of a sweep's plan is done; empty for a folder that is no sweep."""
    if found is None:
        return ""
    share = {name: f"{100 * found[name] / max(found['planned'], 1):.1f}" for name in ("done", "running", "failed")}
    text = f"sweep: {counts(found)}"
    return COVERAGE.render(**share, text=text + (f", {found['twice']} done twice" if found["twice"] else ""))


def running_html(view: ExperimentAnalyzer) -> str:
    """Where the runs at work stand: stage, step and newest measures."""
    at_work = [run for run in view.experiments if run.status == "running"]
    if not at_work:
        return ""
    rows = []
    for run in at_work[:MOST_RUNNING]:
        last = run.metrics[-1] if run.metrics else {}
        newest = {name: values[-1] for (stage, name), (_, values) in run.curves.items() if stage == last.get("stage")}
        measures = [shown(newest.get(name)) for name in ("train_loss", "val_loss", "tokens_per_sec")]
        rows.append([view.label(run), str(last.get("stage") or "-").replace("_", " "), shown(last.get("iteration"))])
        rows[-1] += measures
    note = f"{len(at_work)} at work" + (f", {MOST_RUNNING} shown" if len(at_work) > MOST_RUNNING else "")
    names = ["at work", "stage", "step", "training loss", "validation loss", "tokens/s"]
    return ROWS.render(names=names, rows=rows, note=note)


def settings_html(view: Overview) -> str:
    """A row a setting with its mean and interval; a bar from 0 shows how large the mean is."""
    rows = view.setting_rows()
    if not rows:
        finished = any(run.status == "finished" for run in view.runs.experiments)
        why = f"none of the finished runs here has {view.metric}" if finished else "no run here has finished yet"
        return NOTE.render(text=f"{why}: the table of settings comes with the first that has")
    sections = len(view.parts()) > 1 and "model" in rows[0]
    names = [name for name in rows[0] if name not in (str(view.metric), "low", "high", "seeds")]
    names = [name for name in names if not (sections and name == "model")]
    reach = max((abs(row[str(view.metric)]) for row in rows), default=0) or 1.0
    best = view.best_settings()
    said, section = [], None
    for place, row in enumerate(rows[:MOST_SETTINGS]):
        now = str(row["model"]) if sections else None
        said.append(
            {
                "section": now if now != section else None,
                "cells": [_setting(name, row[name]) for name in names],
                "color": view.color(row),
                "mean": shown(row[str(view.metric)]),
                "interval": "-" if row["low"] is None else f"{shown(row['low'])} to {shown(row['high'])}",
                "seeds": row["seeds"],
                "width": f"{100 * abs(row[str(view.metric)]) / reach:.1f}",
                "best": place in best,
            }
        )
        section = now
    left_out = f"{len(said)} of {len(rows)} settings shown, the export holds all; " if len(said) < len(rows) else ""
    titles = [name.replace("_", " ") for name in names]
    return SETTINGS.render(names=titles, metric=view.metric, rows=said, note=left_out + view.seeds_note())


def _setting(name: str, value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return shown(withheld(name, value))


def runs_html(view: ExperimentAnalyzer) -> str:
    """The newest runs, those at work first: what sets them apart and what was measured."""
    rows = view.get_comparison_table()
    if not rows:
        return NOTE.render(text="no run fits the filter: take a condition away")
    newest = [row for row in rows if row["status"] == "running"]
    newest += [row for row in reversed(rows) if row["status"] != "running"]
    measured = set(view.metrics())
    cells = [
        [shown(value) if name in measured else _setting(name, value) for name, value in row.items()]
        for row in newest[:MOST_ROWS]
    ]
    note = f"{len(cells)} of {len(rows)} runs shown, newest first; the export holds all"
    names = [name.replace("_", " ").replace("/", " / ") for name in rows[0]]
    return ROWS.render(names=names, rows=cells, note=note if len(cells) < len(rows) else f"all {len(rows)} runs")


def difference_html(view: ExperimentAnalyzer, a: str, b: str) -> str:
    """The config fields in which two runs differ, by run id."""
    one, other = view.experiment(a), view.experiment(b)
    found = {name: values for name, values in view.diff(a, b).items() if name != "name"}
    same = len({*flat(one.config), *flat(other.config)} - {"name"}) - len(found)
    if not found:
        return NOTE.render(text=f"no config field differs ({same} are the same)")
    rows = [[name, _setting(name, x), _setting(name, y)] for name, (x, y) in found.items()]
    return ROWS.render(
        names=["field", view.label(one), view.label(other)], rows=rows, note=f"{same} fields are the same"
    )
