"""What does a person see of many runs? A form that filters and groups them, figures, tables, following, export.

`panel.run_now()` in a cell reads the folder; then the form decides. Runs are read, never written.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
from jinja2 import Environment
from pydantic import Field

from nbhelpers import example_grid, notebook, plots, runtime, selection
from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.collection import Experiment, flat
from nbhelpers.errors import one_line
from nbhelpers.overview import FIGURES, MOST_PARTS, NONE, Overview, coverage
from nbhelpers.overview_html import (
    MISSING,
    REFUSED,
    STAMP,
    coverage_html,
    difference_html,
    running_html,
    runs_html,
    settings_html,
)
from nbhelpers.panel import CSS, ERROR, NOTE, PIXELS_AN_INCH, STATUS, VERDICT, guarded, offer_download
from nbhelpers.records import slug
from nbhelpers.registry import unknown
from nbhelpers.strict import StrictConfig
from nbhelpers.tables import counted
from nbhelpers.widgets import Control, glossary, make_control

EXAMPLE = "example runs"
ALL = "all"
FOLLOW_SECONDS = 2.0
QUIET_LOOKS = 3  # looks in a row at which nothing runs: then following ends
WORDS = {
    "run": "One piece of work with a record of its own: config, metrics, result. A sweep is a folder of many.",
    "setting": "Runs whose configs differ by their seed alone.",
    "seed": "The number from which random choices of a run follow: data order, random scores, samples.",
    "interval": "Where the mean over many seeds would lie with 95 % confidence (Student t); wide with 2 seeds.",
    "control": "The same model with nothing closed, fine-tuned with the same budget.",
    "recovery": "The share of what pruning cost that fine-tuning brought back.",
}
_templates = Environment(autoescape=True)


class AnalysisConfig(StrictConfig):
    """What the form of the analysis says; None: what the runs suggest."""

    folder: str = Field(EXAMPLE, description="a folder with runs, at any depth, also while they are written")
    kind: str = Field(ALL, description="what kind of work")
    model: str = Field(ALL, description="of which model")
    status: str = Field(ALL, description="how it ended, or that it goes on")
    filter: str = Field("", description="words of the name, or strategy=gradient level>0.1")
    metric: str | None = Field(None, description="what decides")
    group_by: str | None = Field(None, description="the setting along the axis")
    color_by: str | None = Field(None, description="the setting that has the colours")
    figure: str = Field("by_setting", description="drawn of what is shown")


class AnalysisPanel:
    """`AnalysisPanel("runs", filter="level>0.1")`: given values stand in the form first, then the form decides.

    folder: None = the example runs that come with the package. `view` (the runs that fit) and `overview` (what they
    say) are those of the last look.
    """

    title = "Analysis of many runs"
    question = "What do these runs say together, and which setting is best?"

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        *,
        kind: str | None = None,
        model: str | None = None,
        status: str | None = None,
        filter: str | None = "",
        metric: str | None = None,
        group_by: str | None = None,
        color_by: str | None = None,
        figure: str = "by_setting",
        root: Path | None = None,
    ) -> None:
        if figure not in FIGURES:
            raise LookupError(unknown("figure", figure, FIGURES))
        selection.parse(filter or "")  # what cannot be read is said before anything is looked at
        first = {"kind": kind or ALL, "model": model or ALL, "status": status or ALL, "filter": filter or ""}
        folder = EXAMPLE if folder is None else str(folder)
        self.first = AnalysisConfig(
            folder=folder, metric=metric, group_by=group_by, color_by=color_by, figure=figure, **first
        )
        self.root, self.live = Path(root or notebook.runs_root()), runtime.where() != "papermill"
        self.analyzer: ExperimentAnalyzer | None = None
        self.view: ExperimentAnalyzer | None = None
        self.overview: Overview | None = None
        self.folder: Path | None = None  # where the runs really lie
        self.state = "ready"
        self._chosen: dict[str, str | None] = {"metric": metric, "group_by": group_by, "color_by": color_by}
        self._read_from: str | None = None
        self._drawable: tuple[tuple, dict[str, str | None]] = ((), {})
        self._quiet = threading.local()
        self._looking = threading.RLock()  # one look at a time
        self._wanted, self._worker, self._follower = threading.Event(), None, None
        self._guard, self._stop_following = threading.Lock(), threading.Event()
        self._build()

    # what is displayed --------------------------------------------------------------------------------------------

    def _build(self) -> None:
        html, layout = ipywidgets.HTML, ipywidgets.Layout
        self.controls = {name: self._control(name) for name in AnalysisConfig.model_fields}
        form = ipywidgets.VBox([control.box for control in self.controls.values()])
        form.add_class("nbh-form")
        self.head = html(
            _templates.from_string(
                '<style>{{ css|safe }}</style><p class="nbh-title">{{ title }}</p><p class="nbh-sub">{{ sub }}</p>'
            ).render(css=CSS.read_text(encoding="utf-8"), title=self.title, sub=self.question)
        )
        self.follow = ipywidgets.ToggleButton(description="Follow", icon="eye", layout=layout(width="auto"))
        self.follow.tooltip = "read what changes every few seconds, until nothing runs any more"
        self.export_button = ipywidgets.Button(description="Export", icon="download", layout=layout(width="auto"))
        self.export_link = html()
        self.status, self.coverage, self.stamp, self.error, self.running = html(), html(), html(), html(), html()
        self.verdict, self.tables, self.missing, self.all_runs, self.difference = (html() for _ in range(5))
        self.pictures: dict[str, ipywidgets.Image] = {}
        self.picture_note, self.live_box = html(), ipywidgets.VBox([])
        self.pair = [ipywidgets.Dropdown(description=text, options=[]) for text in ("one", "other")]
        names = {
            "status": self.status,
            "coverage": self.coverage,
            "stampline": self.stamp,
            "error": self.error,
            "running": self.running,
            "best": self.verdict,
            "table": self.tables,
            "live": self.live_box,
            "figurenote": self.picture_note,
            "allruns": self.all_runs,
            "difference": self.difference,
            "follow": self.follow,
        }
        for name, widget in names.items():
            widget.add_class(f"nbh-{name}")
            if widget is not self.follow:
                widget.layout.width = "100%"
        for widget in (self.coverage, self.stamp, self.error, self.running, self.verdict, self.picture_note):
            widget.layout.display = "none"
        save = ipywidgets.HBox([self.export_button, self.export_link], layout=layout(align_items="center"))
        save.add_class("nbh-download")
        buttons = ipywidgets.HBox([self.follow, save], layout=layout(flex_flow="row wrap", align_items="center"))
        pair = ipywidgets.HBox(self.pair, layout=layout(flex_flow="row wrap"))
        pair.add_class("nbh-pair")
        folded = ipywidgets.Accordion(
            children=[self.all_runs, ipywidgets.VBox([pair, self.difference])], selected_index=None
        )
        folded.set_title(0, "All runs")
        folded.set_title(1, "What differs between two runs")
        folded.layout.width = "100%"
        folded.add_class("nbh-more")
        left = ipywidgets.VBox([form, glossary(WORDS)], layout=layout(flex="1 1 260px"))
        left.add_class("nbh-left")
        right = ipywidgets.VBox(
            [
                *(buttons, self.status, self.coverage, self.stamp, self.error, self.running, self.verdict),
                *(self.picture_note, self.live_box, self.tables, folded, self.missing),
            ],
            layout=layout(flex="4 1 430px", min_width="320px"),
        )
        columns = ipywidgets.HBox([left, right], layout=layout(flex_flow="row wrap", align_items="flex-start"))
        columns.add_class("nbh-columns")
        self.box = ipywidgets.VBox([self.head, columns])
        self.box.add_class("nbh-panel")
        for name, control in self.controls.items():
            for part in control.parts:
                part.observe(lambda _change, name=name: self._changed(name), "value")
        for choice in self.pair:
            choice.observe(lambda _change: self._pair_changed(), "value")
        self.follow.observe(lambda change: self._follow_switched(change["new"]), "value")
        self.export_button.on_click(self._export_clicked)
        self._say("ready", "nothing was read yet: the next cell does, and so does a change in the form")

    def _control(self, name: str) -> Control:
        info, value = AnalysisConfig.model_fields[name], getattr(self.first, name)
        if name == "folder":
            known = [EXAMPLE, str(self.root)] if self.root.is_dir() else [EXAMPLE]
            return make_control(name, info, value, known, True)
        if name == "filter":
            return make_control(name, info, value)
        said = FIGURES[value] if name == "figure" else value or NONE
        choices = list(FIGURES.values()) if name == "figure" else list(dict.fromkeys([ALL, said]))
        return make_control(name, info, said, choices)

    def show(self) -> None:
        """Display the panel; where no front end is, its text says so."""
        from IPython.display import display

        if not self.live:
            return
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        text = "the panel: it needs a running kernel, so run the cells to see it"
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": text}, raw=True)

    def _say(self, kind: str, text: str = "") -> None:
        self.state = kind
        self.status.value = STATUS.render(kind=kind, text=text)

    def show_error(self, error: BaseException) -> None:
        """One line; the traceback is kept for what is no mistake of the form."""
        mistake = isinstance(error, ValueError | LookupError | OSError)
        trace = "" if mistake else "".join(traceback.format_exception(error))
        put(self.error, ERROR.render(line=one_line(error), trace=trace))
        self._say("failed", "what stands below is from the last look that worked" if self.overview else "")

    # looking ------------------------------------------------------------------------------------------------------

    def run_now(self) -> Overview:
        """Read the folder and show what the form asks, here and now; raises what is wrong with it."""
        with self._looking:
            self._look()
        return self.overview

    def _look(self) -> None:
        folder, values = self.controls["folder"].get(), self.values()
        if folder != self._read_from:
            self.folder = example_grid.unpacked(self.root) if folder == EXAMPLE else Path(folder).expanduser()
            self.analyzer, self._read_from = ExperimentAnalyzer(self.folder), folder
        self.analyzer.load_all()
        asked = {name: None if values[name] == ALL else values[name] for name in ("kind", "model", "status")}
        self.view = selection.select(self.analyzer, values["filter"], **asked)
        self.overview = Overview(self.view, self.folder, **self._chosen)
        fields = dict.fromkeys(field for run in self.analyzer.experiments for field in flat(run.config))
        for name in ("group_by", "color_by"):
            self._check(name, self._chosen[name], [NONE, *fields])
        self._check("metric", self._chosen["metric"], self.analyzer.metrics())
        self._offer_choices()
        put(self.error, "")
        self._show_runs()
        self._show_figure()
        running = sum(run.status == "running" for run in self.view.experiments)
        whole = len(self.analyzer.experiments)
        kept = len(self.view.experiments)
        text = f"{kept} of {whole} runs shown" if kept != whole else f"{whole} runs"
        text += f" ({counted(run.status for run in self.view.experiments)})" if kept else ""
        self._say("running" if running else "ready", text)

    def _check(self, name: str, value: str | None, known: Sequence[str]) -> None:
        """A name must be one that the runs of the folder have, where there are runs to tell."""
        if value is not None and value not in known and self.analyzer.experiments:
            raise LookupError(unknown(name, value, known))

    def values(self) -> dict[str, str]:
        return {name: control.get() for name, control in self.controls.items()}

    def figure_name(self) -> str:
        """The key of the figure that is chosen."""
        said = self.controls["figure"].get()
        return next(name for name, text in FIGURES.items() if text == said)

    def _offer_choices(self) -> None:
        runs = self.analyzer.experiments
        for name, of in (("kind", lambda run: run.kind), ("status", lambda run: run.status), ("model", _model)):
            found = dict.fromkeys(sorted({of(run) for run in runs} - {None}))
            self._offer(name, [ALL, *found], self.controls[name].get())
        view = self.overview
        self._offer("metric", view.metrics() or [NONE], view.metric or NONE)
        for name in ("group_by", "color_by"):
            self._offer(name, [NONE, *view.settings()], getattr(view, name) or NONE)
        labels = {self.view.label(run): run.run_id for run in self.view.experiments}
        first = self._first_pair(list(labels.values()))
        for choice, run_id in zip(self.pair, first, strict=True):
            now = choice.value if choice.value in labels.values() else run_id
            self._set(choice, list(labels.items()), now)

    def _first_pair(self, ids: Sequence[str]) -> tuple[str | None, str | None]:
        """The best run and the one after it in the table, or what there is."""
        groups = self.overview.groups()
        if len(groups) > 1:
            ends = sorted(groups, key=lambda group: group.interval.mean)
            return ends[0].run_ids[0], ends[-1].run_ids[0]
        return (ids[0], ids[-1]) if ids else (None, None)

    def _offer(self, name: str, options: Sequence[str], value: str) -> None:
        widget = self.controls[name].parts[0]
        self._set(widget, list(dict.fromkeys([*options, value])), value)

    def _set(self, widget: Any, options: Sequence[Any], value: Any) -> None:
        """New options and value of a dropdown, not taken for a click."""
        self._quiet.on = True
        try:
            if list(widget.options) != list(options):
                widget.options = options
            if widget.value != value:
                widget.value = value
        finally:
            self._quiet.on = False

    # what is shown ------------------------------------------------------------------------------------------------

    def _show_runs(self) -> None:
        view = self.overview
        put(self.stamp, STAMP.render(text=view.stamp) if view.stamp else "")
        put(self.coverage, coverage_html(coverage(self.folder)))
        put(self.running, running_html(self.view))
        try:
            best = view.best_lines()
        except ValueError as error:  # the metric's name does not tell which way is better
            best = [one_line(error).replace("pass lower_is_better", "its table and figures stand below")]
        put(self.verdict, VERDICT.render(lines=best) if best else "")
        self.tables.value = settings_html(view)
        problems = "".join(str(NOTE.render(text=f"note: {problem}")) for problem in self.view.problems[:5])
        self.all_runs.value = runs_html(self.view) + problems
        self._show_difference()

    def _show_difference(self) -> None:
        a, b = (choice.value for choice in self.pair)
        if a is None or b is None:
            self.difference.value = NOTE.render(text="two runs are needed")
            return
        self.difference.value = difference_html(self.view, a, b)

    def _show_figure(self) -> None:
        if not self.live:
            return
        try:
            figures = self.overview.figures(self.figure_name())
        except ValueError as error:
            self.pictures, self.live_box.children = {}, ()
            put(self.picture_note, REFUSED.render(why=one_line(error)))
            return
        parts = len(self.overview.parts())
        more = (
            f"the first {MOST_PARTS} of {parts} models: choose one above for the others" if parts > MOST_PARTS else ""
        )
        put(self.picture_note, NOTE.render(text=more) if more else "")
        for name, figure in figures.items():
            content = plots.png(figure, dots_per_inch=120)
            if name not in self.pictures:
                self.pictures[name] = ipywidgets.Image(
                    format="png", layout={"max_width": "100%", "align_self": "flex-start"}
                )
            if self.pictures[name].value != content:
                self.pictures[name].value = content
            width, _ = figure.get_size_inches()
            self.pictures[name].layout.width = f"{width * PIXELS_AN_INCH:.0f}px"
        self.pictures = {name: self.pictures[name] for name in figures}
        if tuple(self.pictures.values()) != self.live_box.children:
            self.live_box.children = tuple(self.pictures.values())
        shown = (self.overview.metric, *((run.run_id, run.status, len(run.metrics)) for run in self.view.experiments))
        if self._drawable[0] != shown:  # trying every figure takes longer than drawing one
            self._drawable = shown, self.overview.drawable()
        why = {FIGURES[name]: text for name, text in self._drawable[1].items() if text}
        put(self.missing, MISSING.render(why=why) if why else "")

    # the form -----------------------------------------------------------------------------------------------------

    @guarded
    def _changed(self, name: str) -> None:
        if getattr(self._quiet, "on", False):
            return
        if name == "folder":
            self._chosen = dict.fromkeys(self._chosen)
            for other in ("kind", "model", "status"):
                self._offer(other, [ALL], ALL)
        elif name in self._chosen:
            self._chosen[name] = self.controls[name].get()
        self.export_link.value = ""  # it held what was asked before
        self._look_soon()

    @guarded
    def _pair_changed(self) -> None:
        if not getattr(self._quiet, "on", False) and self.view is not None:
            self._show_difference()

    def _look_soon(self) -> None:
        """Look in a thread of its own; several changes in a row end in one look at the last of them."""
        self._wanted.set()
        with self._guard:
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="nbhelpers-analysis", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        while True:
            self._wanted.clear()
            self._look_safely()
            with self._guard:
                if not self._wanted.is_set():
                    self._worker = None
                    return

    @guarded
    def _look_safely(self) -> None:
        with self._looking:
            self._look()

    def wait(self, seconds: float | None = None) -> None:
        """Until what the form asked last is shown."""
        worker = self._worker
        if worker is not None:
            worker.join(seconds)

    # following ----------------------------------------------------------------------------------------------------

    @guarded
    def _follow_switched(self, on: bool) -> None:
        self._stop_following.set()
        if not on:
            return
        self._stop_following = stop = threading.Event()
        self._follower = threading.Thread(target=self._follow, args=(stop,), name="nbhelpers-follow", daemon=True)
        self._follower.start()

    def _follow(self, stop: threading.Event) -> None:
        """Look again every few seconds where something changed, until nothing runs any more."""
        still, last, said = 0, None, "nothing runs any more, so following has ended"
        while still < QUIET_LOOKS and not stop.is_set():
            try:
                with self._looking:
                    mark = None if self.analyzer is None else self._mark()
                    if mark is None or mark != last:
                        self._look()
                        last = mark  # from before this look: what came meanwhile is another mark the next time
                    still = 0 if self._anything_runs() else still + 1
            except Exception as error:  # noqa: BLE001 - a thread's own output is shown nowhere
                self.show_error(error)
                still, said = QUIET_LOOKS, ""
            if still < QUIET_LOOKS:
                stop.wait(FOLLOW_SECONDS)
        if not stop.is_set():
            if said:
                self._say("ready", said)
            self.follow.value = False

    def _mark(self) -> tuple:
        """Another value where a run came, went on or ended."""
        runs = self.analyzer.load_all()
        found = coverage(self.folder)
        done = None if found is None else tuple(found[name] for name in ("done", "failed", "running"))
        return (done, *((run.run_id, run.status, len(run.metrics), len(run.events)) for run in runs))

    def _anything_runs(self) -> bool:
        found = coverage(self.folder)
        at_work = any(run.status == "running" for run in self.analyzer.experiments)
        return at_work or bool(found and found["running"])

    # what leaves --------------------------------------------------------------------------------------------------

    @guarded
    def _export_clicked(self, _button: Any = None) -> None:
        self.export_button.disabled = True
        self.export_link.value = NOTE.render(text="preparing the archive ...")
        try:
            self.export_link.value = offer_download(self.export())
        except Exception:
            self.export_link.value = ""
            raise
        finally:
            self.export_button.disabled = False

    def export(self) -> Path:
        """What the form asks as one zip: runs, values and settings as CSV, figures as SVG and PNG. Looks if needed."""
        self.wait()
        with self._looking:
            if self.overview is None:
                self._look()
            name = "example-grid" if self.overview.stamp else slug(self.folder.resolve().name)
            return self.overview.export(self.root / "exports" / f"analysis-{name}.zip")

    # in a cell ----------------------------------------------------------------------------------------------------

    def settings(self) -> str:
        """What the form says, a line a field."""
        return "\n".join(f"{name:<10} {value}" for name, value in self.values().items())


def put(widget: ipywidgets.HTML, value: str) -> None:
    """Show HTML; a part that is empty takes no room."""
    widget.value, widget.layout.display = value, "" if value else "none"


def _model(run: Experiment) -> str | None:
    model = run.config.get("model")
    return None if model is None else str(model)
