"""What does a person see of large models against small ones? What it takes, the answers as they come, the verdict.

Stop and a lost kernel leave what was answered, and Run goes on with it. What the same models answered before is taken
from there without loading them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
from jinja2 import Environment

from nbhelpers import (
    baselines,
    catalogue,
    colab,
    comparison_report,
    dialogues,
    durations,
    earlier,
    notebook,
    plots,
    plots_comparison,
    runtime,
)
from nbhelpers import comparison_before as before
from nbhelpers import comparison_form as forms
from nbhelpers.comparison import Comparison
from nbhelpers.comparison_config import ComparisonConfig
from nbhelpers.comparison_form import ComparisonForm
from nbhelpers.comparison_live import Live, result_table
from nbhelpers.comparison_said import curves, grouped_facts, printed, report_link, sentences
from nbhelpers.errors import one_line
from nbhelpers.panel import NOTE, Panel, guarded
from nbhelpers.runs import Run
from nbhelpers.tick_boxes import tick_boxes
from nbhelpers.widgets import Form, glossary

NEW = "a new run"
RUNS_OFFERED = 12  # earlier runs
LABELS = {  # over the ticks
    "llm_models": "large models, not fine-tuned (zero-shot)",
    "slm_models": "small models, not fine-tuned (zero-shot) and then fine-tuned",
    "baselines": "baselines, which need no language model",
}
WORDS = {
    "not fine-tuned (zero-shot)": "Asked as it was published, without an example. Results call a large one untrained.",
    "fine-tuned": "Trained on the dialogues that are to tune on, then asked what the others were asked.",
    "accuracy": "The share of test dialogues whose first-ranked label is right. All labels are ranked by their "
    "probability, which is the kindest measure to a model that was not tuned: no answer is invalid.",
    "no answer": "Written answers in which no label could be read.",
    "F1": "The mean over labels of how rightly and how fully each is found (macro F1): rare ones count as much.",
    "baseline": "The most frequent label, TF-IDF with a linear model, the nearest training dialogue. They may win.",
    "to choose by": "Validation dialogues choose the best state, thresholds and weights; the test chooses nothing.",
    "smallest difference told": "What so many test dialogues find in 4 of 5 tries, where exactly one of two models is "
    "right on half of them. A smaller difference mostly goes unseen.",
    "break-even": "From how many labelled dialogues on the tuned small model is ahead of the large one.",
    "accept or route": "Answers above a certainty are coded, the others go to a person; what share is that?",
    "4 bits": "Weights rounded to 16 levels (nf4): a quarter of the memory, a little less accurate.",
    "gated": "Its page on the hub asks for consent first; then a token (HF_TOKEN) opens it.",
}
_templates = Environment(autoescape=True)
INTERIM = _templates.from_string('<div class="nbh-verdict nbh-interim">{{ text }}</div>')
REFUSED = _templates.from_string('<span class="nbh-refused" role="alert">{{ text }}</span>')


class ComparisonPanel(Panel):
    """`ComparisonPanel(llm_models="small-llama", slm_models="tiny-llama, tiny-gpt2", epochs=4)`: given values stand in
    the form first, then the form decides.

    resume: the name or folder of an interrupted run to go on with, or "newest"; then that run's own config is run, in
    its own run directory. more: fields of ComparisonConfig that have no parameter of their own.
    """

    title = "Large models as they are, small ones fine-tuned"
    question = "Can specialisation beat size?"
    promise = (
        "Here come: what each model gets right as it answers, the tuning at work, the verdict as it stands and at "
        "last, three curves, and what was checked."
    )
    notebook_name = "04_llm_vs_slm"
    main = ("llm_models", "llm_4bit", "slm_models", "slm_4bit", "data", "dialogue_column", "label_column")
    main += ("max_eval_samples", "method", "learning_rate", "epochs", "shots", "break_even_points", "ensemble")
    main += ("budget", "price_per_hour", "seed")
    parameters = main

    def __init__(
        self,
        *,
        resume: str | None = None,
        more: Mapping[str, Any] | None = None,
        root: Path | None = None,
        **values: Any,
    ) -> None:
        config = ComparisonForm(**values, **(more or {}))
        self.before, self.needed, self.whole, self.interim = (
            ipywidgets.HTML(layout={"width": "100%"}) for _ in range(4)
        )
        self.report_link, self.choice_note, self.open_note = (ipywidgets.HTML() for _ in range(3))
        self.choice = ipywidgets.Dropdown(description="run", options=[NEW], layout={"width": "100%"})
        self.choice.add_class("nbh-control")
        self.choice_box = ipywidgets.VBox([self.choice, self.choice_note])
        self.choice_box.add_class("nbh-field")
        self.choice_box.add_class("nbh-resume")
        self.earlier: dict[str, Run] = {}
        self.seen: Live | None = None
        self.expected: dict[str, float] = {}
        self._moved, self._shown_result, self._choosing = True, False, False
        root = Path(root or notebook.runs_root())
        super().__init__(self._form(config), root, live=runtime.where() != "papermill")
        for label, widget in {
            "before": self.before,
            "fitting": self.needed,
            "interim": self.interim,
            "report": self.report_link,
        }.items():
            widget.add_class(f"nbh-{label}")
        self.report_link.add_class("nbh-download")
        self._offer_earlier()
        self.choice.observe(self._chosen, "value")
        self._columns_where_needed()
        if resume is not None:
            self.choice.value = forms.label(
                earlier.find_unfinished(
                    resume, [run for run in self.earlier.values() if run.status in earlier.UNFINISHED], "comparison"
                )
            )

    def _form(self, config: ComparisonForm) -> Form:
        form = Form(
            ComparisonForm,
            forms.texts(config),
            main=self.main,
            choices={"data": [dialogues.BUNDLED, dialogues.HUB]},
            open_choices=("data",),
            hidden=("name",),
        )
        tick_boxes(form.controls["llm_models"], forms.offered("llm_models"), others=True)
        tick_boxes(form.controls["slm_models"], forms.offered("slm_models"), others=True)
        tick_boxes(form.controls["baselines"], sorted(baselines.BASELINES))
        for field, label in {"llm_4bit": "large models in 4 bits", "slm_4bit": "small models in 4 bits"}.items():
            form.controls[field].parts[0].description = label
        for field, label in LABELS.items():
            form.controls[field].box.children[0].value = f'<span class="nbh-tickname">{label}</span>'
        return form

    def above_form(self) -> list:
        return [self.choice_box]

    def below_form(self) -> list:
        self.open_button = ipywidgets.Button(description="Take these", layout={"width": "auto"})
        self.open_button.on_click(self._open_clicked)
        self.open_box = ipywidgets.VBox([self.open_note, self.open_button], layout={"display": "none"})
        self.open_box.add_class("nbh-offer")
        named = ipywidgets.HTML(before.catalogue_table(), layout={"width": "100%"})
        return [self.whole, self.open_box, self.needed, named, glossary(WORDS)]

    def _build(self) -> None:
        super()._build()
        right = self.box.children[-1].children[1]
        at = right.children.index(self.status)
        parts = [*right.children[:at], self.before, *right.children[at:]]
        at = parts.index(self.verdict)
        right.children = [*parts[:at], self.interim, self.verdict, self.report_link, *parts[at + 1 :]]

    # before -------------------------------------------------------------------------------------------------------

    def config(self) -> ComparisonConfig:
        """What Run runs: the config of the interrupted run that was chosen, else what the form says."""
        run = self.resumed
        return self.form.config().comparison() if run is None else forms.from_record(run.config)

    def _form_changed(self) -> None:
        self._columns_where_needed()
        whole = self.form.refusals().get("", "")
        self.whole.value = REFUSED.render(text=whole) if whole else ""
        super()._form_changed()

    def _columns_where_needed(self) -> None:
        own = self.form.controls["data"].get() not in (dialogues.BUNDLED, dialogues.HUB)
        for field in ("dialogue_column", "label_column"):
            control = self.form.controls[field]
            control.box.layout.display = "" if own or control.get() else "none"

    def phases(self, config: ComparisonConfig) -> dict[str, float]:
        return self.expected or before.relative_seconds(config)

    def estimated(self, config: ComparisonConfig) -> str:
        """Data as tiles and models as bars; then about how long a run would take."""
        rows = before.needs(config)
        self.needed.value = before.needs_table(rows)
        self._offer_open(rows)
        self.expected = {}
        if not before.is_here(config.data):
            self.before.value = NOTE.render(text=f"{config.data}: its rows are read from the hub when Run is pressed")
            return "how long it takes is known once data and models are here"
        try:
            data, split = before.look_at(config)
        except (ValueError, LookupError, OSError) as error:
            self.before.value = REFUSED.render(text=one_line(error))
            return ""
        self.before.value = before.BEFORE.render(
            tiles=before.tiles(data, split, config), text=" ".join(before.remarks(data, split, config))
        )
        lacking = [row["name"] for row in rows if row["bytes"] is not None and not row["fits"]]
        large = f"; {', '.join(lacking)} may not fit" if lacking else ""
        if config.budget:
            return f"rows and epochs are chosen for {config.budget}{large}"
        runs = list(self.earlier.values())
        if config.cache and (same := forms.twin(config, runs)):
            return f"a few seconds: answers are taken from {same.folder.name}, no model is loaded{large}"
        self.expected = forms.seconds_before(config, runs) or {}
        known = "going by the last run of these models here" if self.expected else "estimated from this device's speed"
        try:
            self.expected = self.expected or before.expected_seconds(config, data, split)
        except LookupError as error:
            return f"{one_line(error)}{large}"
        return f"about {durations.in_words(sum(self.expected.values()))}, {known}{large}"

    def said_before(self) -> str:
        """What Run would compare, on what: the same on every machine."""
        config = self.config()
        lines = [f"{'large, not fine-tuned (zero-shot)':<36} {', '.join(one.name for one in config.llm_models)}"]
        lines += [f"{'small, as they are and fine-tuned':<36} {', '.join(one.name for one in config.slm_models)}"]
        if before.is_here(config.data):
            data, split = before.look_at(config)
            lines += [f"{what:<36} {number}" for number, what in before.tiles(data, split, config)]
        return "\n".join(lines)

    # gated models -------------------------------------------------------------------------------------------------

    def _offer_open(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Where a chosen model asks for consent and no token is here, the open ones are offered."""
        closed = [] if catalogue.token_state() == "present" else before.gated(rows)
        free = forms.open_set()
        text = (
            f"{', '.join(closed)}: gated, and no token is here (HF_TOKEN in the environment, or Colab's secrets). "
            f"Without one: {free['llm_models']} against {free['slm_models']}, which ask for none and may "
            "be used commercially."
        )
        self.open_note.value = NOTE.render(text=text) if closed else ""
        self.open_box.layout.display = "" if closed else "none"

    @guarded
    def _open_clicked(self, _button: Any = None) -> None:
        self.form.put(forms.open_set())

    # the run ------------------------------------------------------------------------------------------------------

    def carry_out(self, config: ComparisonConfig, progress: Callable, should_stop: Callable[[], bool]) -> dict:
        told = printed() if threading.current_thread() is threading.main_thread() else None

        def tell(now: dict) -> None:
            if told is not None:  # in a cell: its output has a line a model as well
                told(now)
            progress(now)

        run = self.resumed
        where = {"root": self.root} if run is None else {"run_dir": run.folder, "resume": True}
        self._went_on = None if run is None else run.folder.name
        result = Comparison.run(config, progress=tell, should_stop=should_stop, **where)
        comparison_report.write(result["run_dir"])
        return result

    def _keep_in_drive(self, before: set[str]) -> None:
        super()._keep_in_drive(before - {self._went_on})

    # what is seen of it -------------------------------------------------------------------------------------------

    def forget(self, config: ComparisonConfig) -> None:
        self.seen = Live(config, config.data == dialogues.BUNDLED)
        self._moved, self._shown_result = True, False
        self.interim.value = self.report_link.value = ""
        self.choice.disabled = True

    def hear(self, now: Mapping[str, Any]) -> None:
        self.seen.hear(now)

    def says(self, now: Mapping[str, Any], done: int | None, total: int | None) -> str:
        return self.seen.budget if now["stage"] == "budget" else self.seen.says()

    def how_far(self) -> tuple[float, float | None]:
        table = self._timetable
        if table is None or self.seen is None:
            return 0.0, None
        share = min(0.99, self.seen.fraction(table.phases))
        taken = time.monotonic() - table.started
        return share, taken / share - taken if share >= 0.05 else None

    def figures(self) -> dict[str, plots.Figure]:
        if self.result is None:
            return {} if self.seen is None else self.seen.figures()
        return {"accuracy": plots_comparison.accuracy(self.result)} | curves(self.result)

    def table(self) -> str:
        if self.result is not None:
            return result_table(self.result)
        return "" if self.seen is None else self.seen.table()

    def _draw(self) -> None:
        if self.live and self.result is not None and not self._shown_result:  # the pictures of the way go
            self.pictures, self.live_box.children, self._shown_result = {}, (), True
        if self.live:
            so_far = self.seen.interim if self.result is None and self.seen is not None else ""
            self.interim.value = INTERIM.render(text=so_far) if so_far else ""
        super()._draw()

    def _show_result(self, config: ComparisonConfig) -> None:
        whole = self.result
        self.result = whole | {"facts": grouped_facts(whole)}
        try:
            super()._show_result(config)
        finally:
            self.result = whole
        self.report_link.value = report_link(Path(whole["run_dir"]))

    def verdicts(self) -> list[str]:
        return sentences(self.result)

    def lines(self, config: ComparisonConfig) -> Mapping[str, str]:
        run_dir = None if self.resumed is None else str(self.resumed.folder)
        return forms.command_lines(config, run_dir) | {
            "papermill": forms.papermill_line(config, self.notebook_name, self.parameters, run_dir),
            "Python": forms.python_lines(config, run_dir),
        }

    def settled(self) -> None:
        self.choice.disabled = False
        self._choosing = True
        self.choice.value = NEW
        self._choosing = False
        self._offer_earlier()

    # earlier runs -------------------------------------------------------------------------------------------------

    @property
    def resumed(self) -> Run | None:
        """The interrupted run that Run goes on with; None: a new run."""
        run = self.earlier.get(self.choice.value)
        return run if run is not None and run.status in earlier.UNFINISHED else None

    def _offer_earlier(self) -> None:
        found = earlier.find_runs(self.root, colab.drive_folder(), uploads=None)
        mine = [run for run in found if run.kind == "comparison" and forms.from_record(run.config) is not None]
        shown = [run for run in mine if run.status in (*earlier.UNFINISHED, "finished")][:RUNS_OFFERED]
        self.earlier = {forms.label(run): run for run in shown}
        self._choosing = True
        self.choice.options = [NEW, *self.earlier]
        self._choosing = False
        self.choice_box.layout.display = "" if self.earlier else "none"
        self._say_choice()

    @guarded
    def _chosen(self, _change: Any = None) -> None:
        """Put an earlier run into the form: a finished one is shown, with an interrupted one Run goes on."""
        if self._choosing:
            return
        run = self.earlier.get(self.choice.value)
        if run is not None:
            config = forms.form_of(forms.from_record(run.config))
            if config is not None:
                values = forms.texts(config)
                self.form.put({field: values[field] for field in self.form.controls})
        self.form.enable(self.resumed is None and not self.busy)
        if run is not None and run.result is not None:
            self._show_earlier(run)
        self._form_changed()
        self._say_choice()

    def _show_earlier(self, run: Run) -> None:
        self.result, self._shown_result = dict(run.result) | {"run_dir": str(run.folder)}, False
        self._show_result(forms.from_record(run.config))
        self._draw()

    def _say_choice(self) -> None:
        run = self.earlier.get(self.choice.value)
        open_ = sum(one.status in earlier.UNFINISHED for one in self.earlier.values())
        text = f"{len(self.earlier)} here, {open_} not at the end"
        if run is not None and run.status in earlier.UNFINISHED:
            text = f"{run.status}: goes on where it was, in its own folder with its own settings"
        elif run is not None:
            text = "shown below; its settings stand in the form"
            if forms.form_of(forms.from_record(run.config)) is None:
                text = "shown below; its models have settings that no form says, so the form stays as it is"
        self.choice_note.value = NOTE.render(text=text)
        self.run_button.description = "Run" if self.resumed is None else "Go on"
