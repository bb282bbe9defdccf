"""How does a comparison read on one page? The answer first, then tables, figures, curves, checks; nothing from outside.

Every figure is drawn twice, for a page and for a phone, and the browser takes the one that fits.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from nbhelpers import comparison_tables as tables
from nbhelpers import plots, plots_comparison_curves, plots_comparison_size, plots_comparison_use, verdicts
from nbhelpers import plots_comparison as drawn

ANSWERS = {"yes": "Yes", "no": "No", "cannot tell": "Cannot tell"}
TITLE = "Can specialisation beat size?"
HIDDEN = ("host", "hostname", "user", "cwd", "executable")  # of the environment
NAV = {"models": "Models", "curves": "Curves", "tests": "Tests", "took": "Memory and time", "errors": "Errors"}
NAV |= {"data": "Data", "checks": "Checks", "record": "Record"}
# name -> (what draws it, what it shows)
FIGURES: dict[str, tuple[Callable[..., Figure], str]] = {
    "accuracy": (drawn.accuracy, "Accuracy of every model and baseline with its 95 % interval"),
    "size": (plots_comparison_size.size, "Accuracy against number of parameters; bubbles as large as the memory"),
    "cost": (plots_comparison_size.cost, "Accuracy against the cost of 1,000 dialogues"),
    "chapters": (drawn.chapters, "Accuracy by chapter of the best large and the best small model"),
    "frequencies": (drawn.frequencies, "Accuracy by how many training rows a label has"),
    "break_even": (plots_comparison_curves.break_even, "Accuracy against the number of labelled dialogues"),
    "routing": (plots_comparison_curves.routing, "Precision against the share of dialogues coded without a person"),
    "calibration": (plots_comparison_curves.calibration, "How often answers are right against how certain they are"),
    "memory": (plots_comparison_use.memory, "Measured memory of each model"),
    "phases": (plots_comparison_use.phases, "Time of each phase and model"),
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 1.5rem auto 4rem; max-width: 60rem; padding: 0 1rem }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .2rem } h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem } p, li { overflow-wrap: anywhere } p { margin: .5rem 0; max-width: 46rem }
.answer { border: 1px solid #d5d9de; border-left: .4rem solid #6b7280; border-radius: .4rem; padding: .7rem 1rem;
  margin: 1rem 0 } .answer p { font-size: 1.08rem; margin: .35rem 0 0; max-width: none }
.answer.yes { border-left-color: #1b6e2b } .answer.no { border-left-color: #3a3f47 }
.badge { display: inline-block; border-radius: 1rem; padding: .1rem .8rem; color: #fff; background: #59606b;
  font-weight: 650 } .yes .badge { background: #1b6e2b } .no .badge { background: #3a3f47 }
.certainty { color: #555; font-size: .92rem; margin-left: .5rem }
.note { color: #5c5c5c; font-size: .9rem } .failed { color: #a3001b; font-weight: 600 } .none { color: #6b6b6b }
.stamp { border-left: .25rem solid #8a7500; padding: .25rem .8rem; background: #fbf7e3 }
.notice { border: 1px solid #d5d9de; border-radius: .4rem; padding: .5rem .9rem; font-size: .92rem; color: #444 }
.wide { overflow-x: auto; margin: .5rem 0 .8rem; max-width: 100%; background: linear-gradient(to left, #fff 1.4rem,
  #fff0 2.8rem) right / 2.8rem 100% no-repeat local, linear-gradient(to left, #0000 2px, #0002 2px, #0000)
  right / .8rem 100% no-repeat scroll }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; white-space: nowrap }
th, td { text-align: right; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top;
  font-variant-numeric: tabular-nums } th { color: #555; font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; white-space: normal;
  overflow-wrap: break-word; min-width: 15rem; max-width: 20rem }
.left th, .left td, .left td:first-child, .left th:first-child { text-align: left; white-space: normal;
  overflow-wrap: anywhere; min-width: 5.5rem }
.left td.text { min-width: 22rem; white-space: pre-wrap }
figure { margin: .6rem 0 1.2rem } figure img { display: block; width: 100%; max-width: 50rem; height: auto }
figcaption { color: #5c5c5c; font-size: .9rem; max-width: 46rem }
.left.record td:nth-child(2) { max-width: 44rem } li ul { margin: 0 }
details { margin: .6rem 0 } summary { cursor: pointer; color: #0059a0; padding: .15rem 0 }
ul { padding-left: 1.2rem } li { margin: .25rem 0 }
nav { font-size: .92rem } nav a { margin-right: .9rem; color: #0059a0; display: inline-block }
@media (max-width: 600px) { figure img { max-width: 30rem }
  th:first-child, td:first-child { min-width: 8.5rem; max-width: 9.5rem } }
@media print { details > * { display: block } .wide { overflow: visible } }
</style></head><body>
{%- macro grid(table, class="") %}<div class="wide"><table class="{{ class }}"><tr>\
{% for name in table[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in table[1] %}<tr>{% for cell in line %}<td class="{% if cell == '-' %}none{% endif %}\
{% if table[0][loop.index0] == 'dialogue' %}text{% endif %}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{%- macro record(table) %}{% if not table[1] %}<p class="none">Nothing is recorded.</p>{% else %}\
<div class="wide"><table class="left record">{% for line in table[1] %}<tr>\
{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endif %}{% endmacro %}
{%- macro picture(name, note="") %}{% if name in pictures %}<figure><picture>\
<source media="(max-width: 600px)" srcset="{{ pictures[name].narrow }}">\
<img src="{{ pictures[name].wide }}" alt="{{ pictures[name].alt }}"></picture>\
{% if note %}<figcaption>{{ note }}</figcaption>{% endif %}</figure>
{% else %}<p class="note">Not drawn: {{ missing[name] }}.</p>{% endif %}{% endmacro %}
<h1>{{ title }}</h1>
<p class="note" style="max-width: none">{{ setting }}</p>
<div class="answer {{ answer|replace(" ", "-") }}">{% if badge %}<span class="badge">{{ badge }}</span>\
<span class="certainty">{{ certainty }}</span>{% endif %}<p>{{ verdict }}</p></div>
{% if broken %}<p class="failed">{{ broken|length }} of {{ facts|length }} checks FAILED: the numbers below cannot be \
trusted before that is understood. See <a href="#checks">what was checked</a>.</p>{% endif %}
{% for line in lead %}<p>{{ line }}</p>{% endfor %}
{% if generated %}<p class="stamp">On rows that this project generated itself: the numbers say nothing about real \
patients or real dialogues.</p>{% endif %}
<p class="notice">{{ notice }}</p>
<nav>{% for place, name in nav.items() %}<a href="#{{ place }}">{{ name }}</a>{% endfor %}</nav>
<h2 id="models">How good is each?</h2>
{{ picture("accuracy", measure_said) }}
{{ grid(quality) }}
<p class="note">Brackets are 95 % intervals: of as many other test rows, drawn from where these come from, 95 of 100 \
such intervals would hold the true value. Top-3 and top-5: the right label is among so many ranked first.\
{% if codes %} Category: the first three characters of the code are right; chapter: its chapter of ICD-10-CM is.\
{% endif %} Precision is the number format of the weights. "No valid answer" counts written answers that name no \
label. F1 and the breakdowns look at the ranked label where there is one.</p>
<h3>Size against accuracy</h3>\
{{ picture("size", "Hollow: before tuning; an arrow leads from there to the tuned model.") }}
<h3>Where it is right</h3>{% if codes %}{{ picture("chapters", "n: test rows of \
the chapter; thin lines are 95 % intervals.") }}{% endif %}
{{ picture("frequencies", "n: test rows of these labels. A large model has not seen the training rows; they only sort \
the labels here.") }}
<h2 id="curves">Three curves</h2>
<h3>From how many labelled dialogues on does tuning pay?</h3>{% if break_even %}<p>{{ break_even }}</p>{% endif %}
{{ picture("break_even", "Bands are 95 % intervals over the test rows; the bar at the foot is that of the crossing." \
if crosses else "Bands are 95 % intervals over the test rows.") }}
<h3>How much can be coded without a person?</h3>{% for one in routes_said %}<p>{{ one.name }}:</p>\
<ul>{% for line in one.said %}<li>{{ line }}</li>{% endfor %}</ul>{% endfor %}
{{ picture("routing", "Marks: thresholds chosen on validation rows alone, so that the promise of each holds with 95 % \
certainty; their bars are 95 % intervals on the test rows." if promised else "") }}
{% if routes[1] %}{{ grid(routes) }}<p class="note">Answers at least as certain as the threshold are taken, the others \
go to a person; where there is no threshold, all do. It is chosen on validation rows, "coded alone" and "of them \
rightly" are of the test rows.</p>
{{ picture("calibration") }}{{ grid(trust) }}<p class="note">Calibration error: how far apart certainty and share of \
right answers are, on average. Brier score: the mean squared distance of the certainty from 1 where the answer is \
right, from 0 where it is wrong; 0 is best.</p>{% endif %}
<h3>What does it cost?</h3>{% if pays %}<p>{{ pays[0] }}</p>{% endif %}
{{ picture("cost", cost_note) }}{% if costs %}{{ grid(costs) }}{% endif %}
{% if pays|length > 1 %}<details><summary>When tuning has paid: the other pairs</summary><ul>\
{% for line in pays[1:] %}<li>{{ line }}</li>{% endfor %}</ul></details>{% endif %}
{% if ensemble %}<h3>Large and small together</h3><p>{{ ensemble }}</p>{% endif %}
<h2 id="tests">Paired tests</h2>
<p class="note">On the same test rows: first minus second in percentage points with its 95 % interval, how many rows \
only one of the two got right, the exact p of McNemar (how often such a difference comes by chance where there is \
none), and that p corrected by Holm for the number of tests in the table.</p>
{% if decisive[1] %}<h3>Small, fine-tuned, against large</h3>{{ grid(decisive) }}{% else %}<p>No small model was \
tuned, or no large one asked: there is nothing to test between the sides.</p>{% endif %}
{% if pairs[1] %}<details><summary>\
{{ "The only pair" if pairs[1]|length == 1 else "All %s pairs"|format(pairs[1]|length) }}</summary>\
{{ grid(pairs) }}</details>{% endif %}
<h2 id="took">What it took</h2>
<h3>Memory</h3>{{ picture("memory") }}<h3>Time</h3>{{ picture("phases") }}
{% if budget %}<p>{{ budget }}</p>{% endif %}{{ grid(effort) }}
<p class="note">p50, p95 and p99: half, 95 and 99 of 100 requests, asked one at a time, wait at most so long. Tokens \
are counted without padding. Prompts cut: those that were longer than the window. Peak memory (process): what this \
process held more than before, libraries included.</p>
{% if licences[1] %}<h3>Licences</h3>{{ grid(licences, "left") }}{% endif %}
<h3>Tuning</h3>{% if training[1] %}{{ grid(training) }}<p class="note">In \
brackets the step whose weights were kept: the best on the validation rows.</p>{% else %}\
<p class="note">No model was tuned.</p>{% endif %}
<h2 id="errors">What went wrong</h2>
<p class="note">Rows by their id, at most 50 a model; right is the label of the data, said that of the model\
{% if texts %}; dialogues are shown because the run was asked to \
keep them (keep_text){% else %}; no dialogue is shown{% endif %}.</p>
{% for one in errors %}<details{% if loop.first %} open{% endif %}><summary>{{ one.name }}: {{ one.said }}</summary>\
{% if one.table[1] %}{{ grid(one.table, "left") }}{% endif %}</details>{% endfor %}
<h2 id="data">Data</h2>{% for line in data_said %}<p>{{ line }}</p>{% endfor %}
{% if parts[1] %}{{ grid(parts, "left") }}{% endif %}
<details><summary>Cleaning</summary>{{ record(cleaning) }}</details>
<details><summary>Split</summary>{{ record(split) }}</details>
<h2 id="checks">What was checked</h2>
{% if not facts %}<p class="none">Nothing was checked.</p>{% endif %}<ul>{% for check in checks %}<li\
{% if not check.ok %} class="failed"{% endif %}>{{ "holds" if check.ok else "FAILED" }}: {{ check.says }}\
{% if not check.seen[0].model %}<div class="note">{{ check.seen[0].saw }}</div>{% else %}<ul class="note">\
{% for fact in check.seen %}<li>{{ fact.model }}: {{ fact.saw }}</li>{% endfor %}</ul>{% endif %}</li>{% endfor %}</ul>
<h2 id="record">Record</h2>
<details><summary>How models were asked</summary>{{ record(protocol) }}</details>
<details><summary>Configuration</summary><p class="note">What was not set is left out; \
<code>nbhelpers compare run --help</code> says what each setting does. Texts of yours stand as their sha256, files by \
their name.</p>{{ record(config) }}</details>
<details><summary>Fingerprints</summary><p class="note">A run with the same ones asked about the same rows.</p>\
{{ record(fingerprints) }}</details>
<details><summary>Environment</summary>{{ record(environment) }}</details>
<p class="note">Every number is in results.json and result.json beside this page.</p>
</body></html>
"""


def page(result: Mapping[str, Any], manifest: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> str:
    """The page as text. texts: row id -> dialogue, to stand beside the errors; None shows none."""
    pictures, missing = figures(result)
    answer = result.get("answer") or {}
    full = result["experiment"] == "full"
    facts = result.get("facts") or []
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=TITLE if full else f"{TITLE} One side",
            setting=_setting(result, manifest),
            answer=answer.get("answer", "") if full else "",
            badge=ANSWERS.get(answer.get("answer")) if full else None,
            certainty=_certainty(answer),
            verdict=_with_names(result["verdict"], result),
            lead=_lead(result, full),
            generated=result["data"]["generated"],
            facts=facts,
            checks=tables.checks(facts, lambda key: _with_names(key, result)),
            broken=[fact for fact in facts if not fact["ok"]],
            notice=result["notice"],
            pictures=pictures,
            missing=missing,
            nav=NAV,
            codes=result["data"]["kind"] == "icd10",
            measure_said=_measure_said(result),
            **_tables(result),
            **_curves(result),
            **_record(result, manifest),
            errors=_errors(result, texts or {}),
            texts=bool(texts),
        )
    )


def figures(result: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({name: addresses that hold the picture, wide and narrow, and its text}, {name: why there is none})."""
    pictures, missing = {}, {}
    for name, (draw, alt) in FIGURES.items():
        try:
            pictures[name] = {"wide": _address(draw(result)), "narrow": _address(draw(result, narrow=True)), "alt": alt}
        except drawn.NotMeasured as error:
            missing[name] = str(error)
    return pictures, missing


def _address(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(plots.svg(figure).encode()).decode()


def _setting(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    data, rows = result["data"], result["data"]["rows"]
    source = tables.settings({"source": data["source"]})[1]
    kind = "codes of ICD-10-CM" if data["kind"] == "icd10" else "labels"
    made = str(manifest.get("created") or "")[:10]
    return (
        f"Data: {source[0][1] if source else 'not named'}, {data['labels']} {kind}; {rows['train']} rows to train on, "
        f"{rows['validation']} to choose by, {rows['test']} to test on{'; ' + made if made else ''}."
    )


def _certainty(answer: Mapping[str, Any]) -> str:
    gap, p = answer.get("difference"), answer.get("holm_p")
    if not gap or p is None:
        return ""
    return (
        f"small minus large: {tables.points(gap['mean'])} points, 95 % interval {tables.points(gap['low'])} to "
        f"{tables.points(gap['high'])}, p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'}"
    )


def _with_names(said: str, result: Mapping[str, Any]) -> str:
    """A sentence with names that people read for the keys in it, the longest keys first."""
    for key in sorted(result["models"], key=len, reverse=True):
        said = said.replace(key, verdicts.name(key))
    return said


def _lead(result: Mapping[str, Any], full: bool) -> list[str]:
    """What the baselines and tuning did, where the verdict does not say it already."""
    answer, lines = result.get("answer") or {}, []
    for part in ("baselines", "specialisation"):
        said = (answer.get(part) or {}).get("sentence")
        if said and said.rstrip(".")[1:] not in result["verdict"]:
            lines.append(_with_names(said, result))
    if not full:
        lines.append("Only one side was evaluated in this run, so nothing is decided between large and small models.")
    if not any(one["model_type"] == "BASELINE" for one in result["models"].values()):
        lines.append("No baseline was fitted: whether a language model is needed at all is not known.")
    return lines


def _measure_said(result: Mapping[str, Any]) -> str:
    if result["headline"] == "top_1_accuracy":
        return (
            "Models rank all labels; the first counts. That is the kindest measure to a model that was not tuned: none "
            "of its answers is invalid."
        )
    return "Models write an answer, and the label in it counts; an answer that names none is wrong."


def _tables(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quality": tables.quality(result),
        "effort": tables.effort(result),
        "licences": tables.licences(result),
        "training": tables.training(result),
        "decisive": tables.pairs(result, (result.get("answer") or {}).get("tests") or ()),
        "pairs": tables.pairs(result, result.get("paired_tests") or ()),
        "routes": tables.routes(result),
        "trust": tables.certainty(result),
        "costs": tables.costs(result) if result.get("cost") else None,
    }


def _curves(result: Mapping[str, Any]) -> dict[str, Any]:
    """The sentence of each curve."""
    cost, crossing = result.get("cost") or {}, (result.get("break_even") or {}).get("crossing") or {}
    first = [drawn.best(result, "SLM"), drawn.best(result, "LLM")]
    pays = sorted(cost.get("pays") or (), key=lambda one: [one["tuned"], one["large"]] != first)
    routed = [
        {
            "name": drawn.full_name(result["models"][key]),
            "said": _promises(result["routing"][key]["points"]),
        }
        for key in first
        if key in (result.get("routing") or {})
    ]
    price, where = cost.get("price_per_gpu_hour"), cost.get("measured_on", "")
    named = (
        f"At a price of {price:g} {cost.get('currency') or ''} an hour"
        if price is not None
        else "No price was named: this is time"
    )
    drift = f" One model, timed twice, differed by {cost['drift']:.3g} times." if cost.get("drift") else ""
    hollow = " Hollow: before tuning." if any(one.startswith("SLM_") for one in result["models"]) else ""
    return {
        "break_even": (result.get("break_even") or {}).get("sentence"),
        "crosses": crossing.get("state") == "crosses",
        "routes_said": routed,
        "promised": any(map(plots_comparison_curves.marked, _points(result))),
        "pays": [_with_names(one["sentence"], result) for one in pays],
        "cost_note": f"{' '.join(named.split())}; {where}.{hollow}{drift}",
        "ensemble": _with_names((result.get("ensemble") or {}).get("sentence") or "", result),
        "budget": (result.get("budget") or {}).get("text"),
    }


def _points(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for found in (result.get("routing") or {}).values() for one in found["points"]]


def _promises(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence a wanted share; those that no threshold promises share theirs."""
    none = [one for one in points if not one["test"]]
    said = [f"To be right on {one['wanted']:.0%}: {one['says']}." for one in points if one["test"] or len(none) == 1]
    if len(none) > 1:
        *first, last = [f"{one['wanted']:.0%}" for one in none]
        as_much = none[-1]["says"].replace(f"promises {last}", "promises as much")
        said.append(f"To be right on {', '.join(first)} or {last}: {as_much}.")
    return said


def _record(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    data, config = result["data"], manifest.get("config") or {}
    cleaning = data.get("cleaning") or {}
    return {
        "data_said": _data_said(data, cleaning),
        "cleaning": tables.cleaning(cleaning),
        "parts": tables.parts(data.get("split") or {}),
        "split": tables.splitting(data.get("split") or {}),
        "protocol": tables.protocol(
            result.get("protocol") or {}, own="system_prompt" in config and not config["system_prompt"]
        ),
        "config": tables.settings(config),
        "fingerprints": tables.fingerprints(manifest.get("fingerprints") or {}, data.get("split") or {}),
        "environment": tables.environment(manifest.get("environment") or {}, HIDDEN),
    }


def _data_said(data: Mapping[str, Any], cleaning: Mapping[str, Any]) -> list[str]:
    """How many rows there were, how many are left, what the cleaning found, and how often labels are trained on."""
    used, often = sum(data["rows"].values()), sorted((data.get("frequency") or {}).values())
    read, kept = cleaning.get("rows"), cleaning.get("kept")
    said = [f"{used} rows with {data['labels']} labels take part."]
    if read is not None and kept is not None:
        said[0] = f"{read} rows were read and {'all' if kept == read else kept} kept; " + said[0]
    if often:
        said[0] += (
            f" A label has {often[0]} to {often[-1]} rows to train on, half of the labels at most {median(often):g}."
        )
    return said + [f"{line[:1].upper()}{line[1:]}." for line in cleaning.get("says") or ()]


def _errors(result: Mapping[str, Any], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Models first that the answer names, then the rest; baselines last."""
    first = [key for key in (drawn.best(result, "SLM"), drawn.best(result, "LLM")) if key]
    found = []
    for key in dict.fromkeys([*first, *drawn.ordered(result)]):
        entry = result["models"][key]
        table = tables.errors(result, entry, texts)
        right, n = entry.get(result["headline"]), entry["n_samples"]
        wrong = "not measured" if right is None else f"{round(n * (1 - right))} of {n} wrong"
        shown = f", {len(table[1])} shown" if table[1] and not wrong.startswith(f"{len(table[1])} ") else ""
        found.append({"name": drawn.full_name(entry), "said": wrong + shown, "table": table})
    return found
