"""How far is a comparison, and what has each model got right? Heard while it goes on, or read from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from nbhelpers import coding_metrics, curves, plots, plots_comparison, plots_training, verdicts
from nbhelpers.comparison_config import ComparisonConfig
from nbhelpers.plots_comparison import gigabytes, seconds_said

HEADINGS = {  # as plots_comparison.GROUPS, in the words of the form
    ("LLM", False): "Large, not fine-tuned (zero-shot)",
    ("LLM", True): "Large, fine-tuned",
    ("SLM", False): "Small, not fine-tuned (zero-shot)",
    ("SLM", True): "Small, fine-tuned",
    ("ENSEMBLE", False): "Large and small together",
    ("BASELINE", False): "Baselines, which need no language model",
}
FEWER = "Tuned on fewer dialogues, for the break-even curve"
DRAWINGS = 40  # of one model, at most
TUNING_SHARE = 0.7  # of the time of a model that is tuned and asked
NAMES = {"top_1_accuracy": "accuracy", "exact_match_accuracy": "accuracy of what is written"}
TABLE = Environment(autoescape=True).from_string(
    '<div class="nbh-wide"><table class="nbh-runs nbh-grid"><tr><th>model</th><th></th>'
    '<th class="nbh-right" style="overflow-wrap:normal">{{ measure }}</th>'
    '<th class="nbh-right">95 %</th>{% for name in more %}'
    '<th class="nbh-right" style="overflow-wrap:normal">{{ name }}</th>{% endfor %}</tr>'
    "{% for part in parts %}"
    '<tr class="nbh-part"><td colspan="{{ 4 + more|length }}">{{ part.heading }}</td></tr>{% for row in part.rows %}'
    '<tr{% if row.best %} class="nbh-best"{% endif %}>'
    '<td><span class="nbh-key" style="background:{{ row.color }}"></span>{{ row.name }}'
    '{% if row.doing %} <span class="nbh-note">{{ row.doing }}</span>{% endif %}</td>'
    '<td class="nbh-barcell">{% if row.share is not none %}'
    '<i style="width:{{ row.share }}%;background:{{ row.color }}"></i>{% endif %}</td>'
    '<td class="nbh-right">{{ row.accuracy }}</td><td class="nbh-right">{{ row.interval }}</td>'
    '{% for cell in row.more %}<td class="nbh-right">{{ cell }}</td>{% endfor %}</tr>{% endfor %}{% endfor %}</table>'
    '</div><span class="nbh-note">{{ note }}</span>'
)


def planned(config: ComparisonConfig) -> dict[str, dict[str, Any]]:
    """What a comparison evaluates, by key and in its order; trainings on fewer dialogues are not among it."""
    found = {f"BASELINE_{name}": _entry(name, "BASELINE", "fitted") for name in config.baselines}
    if config.experiment != "training":
        for status in ("untrained", *(("finetuned",) if config.fine_tune_llms else ())):
            for model in config.llm_models:
                found[f"LLM_{model.short}_{status}"] = _entry(model.name, "LLM", status)
    if config.experiment != "baseline":
        for status in ("zero_shot", "finetuned"):
            for model in config.slm_models:
                found[f"SLM_{model.short}_{status}"] = _entry(model.name, "SLM", status)
    return found


def _entry(model: str, kind: str, status: str) -> dict[str, Any]:
    return {"model": model, "model_type": kind, "training_status": status}


def name(key: str) -> str:
    """A key as people read it, also of a training on fewer dialogues."""
    first, _, rows = key.rpartition("_on_")
    return f"{first.partition('_')[2]}, tuned on {rows} dialogues" if rows.isdigit() and first else verdicts.name(key)


class Live:
    """A comparison while it goes on. `states`: key -> what that model does now and what it got right so far."""

    def __init__(self, config: ComparisonConfig, generated: bool) -> None:
        self.config, self.generated = config, generated
        self.entries = planned(config)
        self.states: dict[str, dict[str, Any]] = {key: {"doing": "waiting"} for key in self.entries}
        self.at, self.interim, self.budget = "", "", ""
        self.curves: dict[str, dict[str, Any]] = {}  # the tuning at work alone
        self._drawn: dict[str, Any] = {}  # figure -> what it showed

    def hear(self, now: Mapping[str, Any]) -> None:
        """One report of the run's progress."""
        stage, key = now["stage"], now.get("key", "")
        if stage == "budget":
            self.budget = now["says"]
        if key not in self.states and "_on_" not in key:
            return
        if self.at in self.states and self.at != key and self.states[self.at]["doing"] != "answered":
            self.states[self.at]["doing"] = "answered"
        state = self.states.setdefault(key, {})
        self.at = key
        state["doing"] = {"baseline": "fitting"}.get(stage, stage)
        state |= {word: now[word] for word in ("done", "total", "part", "step", "steps", "came") if word in now}
        if "asked" in now:
            state |= {"right": now["right"], "asked": now["asked"]}
        elif stage == "answered":
            state |= {"right": now["right"], "asked": now["total"]}
        if stage == "tuning":
            if key not in self.curves:
                self.curves = {key: curves.empty(now["steps"])}
            curves.hear(self.curves[key], now)
        if now.get("interim"):
            self.interim = now["interim"]

    def says(self) -> str:
        """The model at work and what it does, in a line."""
        if self.at not in self.states:
            return "reading the data"
        state = self.states[self.at]
        doing, right = self._doing(state), ""
        if state.get("asked") and state["doing"] != "tuning":
            right = f", {state['right']} of {state['asked']} right{' so far' if state['doing'] != 'answered' else ''}"
        return f"{name(self.at)}: {doing}{right}"

    @staticmethod
    def _doing(state: Mapping[str, Any]) -> str:
        doing = state["doing"]
        if doing == "tuning":
            return f"tuning, step {state['step']} of {state['steps']}"
        if doing == "answering":
            part = " (validation)" if state.get("part") == "validation" else ""
            return f"answer {state['done']} of {state['total']}{part}"
        return "taken from before" if doing == "answered" and state.get("came") == "cached" else doing

    def share(self, key: str) -> float:
        """How much of one model's part is done."""
        state = self.states[key]
        tuned = TUNING_SHARE if self.entries.get(key, {}).get("training_status") == "finetuned" else 0.0
        if state["doing"] == "answered":
            return 1.0
        if state["doing"] == "tuning":
            return tuned * state["step"] / state["steps"]
        return tuned + (1 - tuned) * state["done"] / state["total"] if state["doing"] == "answering" else 0.0

    def fraction(self, seconds: Mapping[str, float]) -> float:
        """How much of the whole is done. seconds: of each model by key, as expected; any unit."""
        total = sum(seconds.values())
        return sum(seconds[key] * self.share(key) for key in seconds if key in self.states) / total if total else 0.0

    # what is seen -------------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """As far as it is known, what the figures of a comparison draw."""
        found = {}
        for key, entry in self.entries.items():
            state, ends = self.states[key], None
            accuracy = state["right"] / state["asked"] if state.get("asked") else None
            if accuracy is not None:
                low, high = coding_metrics.exact_interval(state["right"], state["asked"])
                ends = {self.config.headline: {"low": low, "high": high}}
            found[key] = entry | {self.config.headline: accuracy, "intervals": ends}
        return {"models": found, "headline": self.config.headline, "data": {"generated": self.generated}}

    def figures(self) -> dict[str, plots.Figure]:
        """Accuracy so far, and the tuning at work: those that show something new, since drawing takes time."""
        known, drawn = self.result(), {}
        asked = {key: state["asked"] * DRAWINGS // state["total"] for key, state in self._asked()}
        if asked and self._is_new("accuracy", asked):
            drawn["accuracy"] = plots_comparison.accuracy(known)
        for key, curve in list(self.curves.items()):
            state = self.states[key]
            if self._is_new("tuning", (key, state["step"] * DRAWINGS // state["steps"], len(curve["validation_nlls"]))):
                about = {"text": {"generated": self.generated}, "strategy": None}
                drawn["tuning"] = plots_training.training({"fine_tuned": curves.copied(curve)}, about)
        return drawn

    def _asked(self) -> list[tuple[str, dict[str, Any]]]:
        return [(key, state) for key in self.entries if (state := self.states[key]).get("asked")]

    def _is_new(self, figure: str, shows: Any) -> bool:
        if self._drawn.get(figure) == shows:
            return False
        self._drawn[figure] = shows
        return True

    def table(self) -> str:
        """Each model with what it does and what it got right so far, as HTML."""
        known = self.result()
        doing = {
            key: "" if state["doing"] == "answered" and state.get("came") != "cached" else self._doing(state)
            for key, state in self.states.items()
        }
        fewer = []
        for key in [key for key in self.states if key not in self.entries]:
            state = self.states[key]
            accuracy = state["right"] / state["asked"] if state.get("asked") else None
            fewer.append(_row(name(key), "#888888", accuracy, None, doing=doing[key]))
        return _table(known, doing, fewer, "95 % intervals over the test dialogues asked so far")


def result_table(result: Mapping[str, Any]) -> str:
    """The entries of a finished comparison as HTML."""
    note = "95 % intervals over the test dialogues"
    if result["data"]["generated"]:
        note += "; all of it on dialogues that this project generated"
    came = {phase["model"]: "taken from before" for phase in result["phases"] if phase.get("came") == "cached"}
    return _table(result, came, [], f"{note}. {result['notice']}")


MORE = ("F1", "no answer", "memory", "time each")


def _table(result: Mapping[str, Any], doing: Mapping[str, str], fewer: list[dict], note: str) -> str:
    measure, looks = result["headline"], plots_comparison.looks(result)
    best = {plots_comparison.best(result, kind) for kind in ("LLM", "SLM")} if result.get("answer") else set()
    more = MORE if result.get("answer") else ()
    parts: dict[str, list[dict]] = {}
    for key, entry in plots_comparison.ordered(result).items():
        row = _row(
            plots_comparison.short(entry),
            looks[key]["color"],
            entry.get(measure),
            plots_comparison.interval(entry, measure),
            doing=doing.get(key, ""),
            best=key in best,
            more=_more(entry) if more else (),
        )
        parts.setdefault(HEADINGS[plots_comparison.group(entry)], []).append(row)
    if fewer:
        parts[FEWER] = fewer
    shown = [{"heading": heading, "rows": rows} for heading, rows in parts.items()]
    return TABLE.render(parts=shown, measure=NAMES[measure], more=more, note=note)


def _row(
    named: str,
    color: str,
    accuracy: float | None,
    ends: tuple[float, float] | None,
    *,
    doing: str = "",
    best: bool = False,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    return {
        "name": named,
        "color": color,
        "share": None if accuracy is None else f"{100 * accuracy:.1f}",
        "accuracy": "" if accuracy is None else f"{100 * accuracy:.1f} %",
        "interval": "" if ends is None else f"{100 * ends[0]:.0f}-{100 * ends[1]:.0f} %",
        "doing": doing,
        "best": best,
        "more": more,
    }


def _more(entry: Mapping[str, Any]) -> tuple[str, ...]:
    peak, speed = plots_comparison.peak_memory(entry), entry.get("performance") or {}
    invalid, seconds = entry.get("no_valid_answer"), speed.get("seconds_per_dialogue")
    return (
        f"{entry['macro_f1']:.3f}",
        "" if invalid is None else f"{invalid} of {entry['n_samples']}",
        gigabytes(peak) if peak else "",
        seconds_said(seconds) if seconds is not None else "",
    )
