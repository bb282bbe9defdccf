"""What does a notebook say of a comparison? Lines while it runs; then sentences, numbers, decisions and figures."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

from nbhelpers import comparison_report, plots, plots_comparison, plots_comparison_curves, plots_comparison_size
from nbhelpers.comparison import RESULTS
from nbhelpers.comparison_live import name
from nbhelpers.panel import LINK_BYTES, NOTE

REPORT = Environment(autoescape=True).from_string(
    '<a download="{{ name }}" href="data:text/html;base64,{{ content }}">Save the report</a> '
    '<span class="nbh-note">(one page with everything: {{ path }})</span>'
)
FIGURES = {
    "size": plots_comparison_size.size,
    "break_even": plots_comparison_curves.break_even,
    "routing": plots_comparison_curves.routing,
    "cost": plots_comparison_size.cost,
}


def printed(say: Callable[[str], object] = print) -> Callable[[Mapping[str, Any]], None]:
    """Says a line a model and what it got right, with the seconds since the run began."""
    started, last = time.monotonic(), [("", "")]

    def tell(now: Mapping[str, Any]) -> None:
        at = (now["stage"], now.get("key", ""))
        if now["stage"] == "answered":
            came = " (taken from before)" if now["came"] == "cached" else ""
            said = f"{name(at[1])}: {now['right']} of {now['total']} right{came}"
        elif now["stage"] == "budget":
            said = now["says"]
        elif now["stage"] == "from before":
            said = f"{name(at[1])}: {now['says']}"
        elif now["stage"] == "tuning" and at != last[0]:
            said = f"{name(at[1])}: tuning, {now['steps']} steps"
        else:
            said = ""
        if said:
            say(f"{time.monotonic() - started:6.1f} s  {said}")
        last[0] = at

    return tell


def curves(result: Mapping[str, Any]) -> dict[str, plots.Figure]:
    """Size against accuracy and the curves: those that could be drawn."""
    return {figure: drawn for figure, drawn in _tried(result).items() if not isinstance(drawn, str)}


def not_drawn(result: Mapping[str, Any]) -> str:
    """The figures that could not be drawn, and why."""
    why = [f"{figure.replace('_', '-')}: {text}" for figure, text in _tried(result).items() if isinstance(text, str)]
    return "\n".join(why) or "every figure could be drawn"


def _tried(result: Mapping[str, Any]) -> dict[str, plots.Figure | str]:
    """Each figure, or why there is none."""
    found: dict[str, plots.Figure | str] = {}
    for figure, draw in FIGURES.items():
        try:
            found[figure] = draw(result)
        except plots_comparison.NotMeasured as error:
            found[figure] = str(error)
    return found


def grouped_facts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checked facts, each once: it holds where it holds of every model; one that fails says of which."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for fact in result["facts"]:
        found.setdefault(fact["name"], []).append(fact)
    facts = []
    for same in found.values():
        failed = [fact for fact in same if not fact["ok"]]
        saw = [f"{name(fact['model'])}: {fact['saw']}" if fact.get("model") else fact["saw"] for fact in failed or same]
        said = "; ".join(saw) if failed or len(same) == 1 else f"of {len(same)} models and states"
        facts.append(dict((failed or same)[0]) | {"ok": not failed, "saw": said})
    return facts


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The verdict, then what its curves say."""
    found = [result["verdict"]]
    found += [result[part]["sentence"] for part in ("break_even", "ensemble") if result.get(part)]
    return found + ([result["budget"]["text"]] if result.get("budget") else [])


def numbers(result: Mapping[str, Any]) -> str:
    """Every entry with its accuracy, interval and F1, a line each."""
    measure, lines = result["headline"], []
    for entry in plots_comparison.ordered(result).values():
        ends = plots_comparison.interval(entry, measure)
        between = f"[{100 * ends[0]:5.1f}, {100 * ends[1]:5.1f}]" if ends else ""
        lines.append(
            f"{plots_comparison.full_name(entry):<40} {100 * entry[measure]:5.1f} % {between}  "
            f"F1 {entry['macro_f1']:.3f}"
        )
    return "\n".join(lines)


def decisions(result: Mapping[str, Any]) -> str:
    """What is the same on every machine: accuracy of what was not trained here, and the decisions about what was."""
    measure, lines = result["headline"], []
    entries = plots_comparison.ordered(result)
    for entry in entries.values():
        if entry["training_status"] in ("untrained", "zero_shot", "fitted") and entry["model_type"] != "ENSEMBLE":
            lines.append(f"{plots_comparison.full_name(entry):<46} {100 * entry[measure]:.1f} %")
    for key, entry in entries.items():
        before = result["models"].get(key.replace("_finetuned", "_zero_shot"))
        if entry["training_status"] == "finetuned" and before is not None and before is not entry:
            raised = entry[measure] > before[measure]
            lines.append(f"{'tuning raised ' + plots_comparison.short(entry):<46} {raised}")
    if result["experiment"] == "full":
        lines.append(f"{'did specialisation beat size?':<46} {result['answer']['answer']}")
        baselines = result["answer"].get("baselines")
        if baselines:
            lines.append(f"{'does a baseline do better than both sides?':<46} {baselines['beats_both']}")
    source = "generated by this project" if result["data"]["generated"] else result["data"]["source"]
    return "\n".join([*lines, f"{'dialogues':<46} {source}"])


def left(result: Mapping[str, Any]) -> str:
    """What a run leaves: its page, its numbers, its tuned models, below the run that tuned them."""
    run_dir = Path(result["run_dir"])
    tuned = [f"models/{key}/model" for key, entry in result["models"].items() if entry.get("model_dir")]
    merged = result.get("merged") or {}
    tuned += [f"models/{merged['key']}/merged"] if "model_dir" in merged else []
    found = {"run": run_dir.name, "report": comparison_report.NAME, "numbers": RESULTS}
    return "\n".join([*(f"{what:<8}{name}" for what, name in found.items()), *(f"{'model':<8}{one}" for one in tuned)])


def report_link(run_dir: Path) -> str:
    """HTML that saves the report of a run; where it lies if it is too large for a link; nothing where there is none."""
    path = run_dir / comparison_report.NAME
    if not path.is_file():
        return ""
    place = os.path.relpath(path)
    if path.stat().st_size > LINK_BYTES:
        return NOTE.render(text=f"the report: {place}")
    content = base64.b64encode(path.read_bytes()).decode()
    return REPORT.render(name=f"{run_dir.name}.html", content=content, path=place)
