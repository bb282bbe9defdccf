"""How does a person start a run, watch it and stop it? A form, Run and Stop, and what the run says while it goes on.

The work happens in a thread, so that Stop is heard; `run_now()` does the same in the thread of the cell. Whatever is
raised is shown in the panel: a callback's own output is shown nowhere.
"""

from __future__ import annotations

import atexit
import base64
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakSet

import ipywidgets
from jinja2 import Environment
from pydantic import BaseModel

from nbhelpers import colab, durations, earlier, memory, plots, runtime
from nbhelpers.errors import one_line
from nbhelpers.tracking import Interrupted
from nbhelpers.widgets import Form

TICK_SECONDS = 0.25
ESTIMATE_AFTER_SECONDS = 0.6  # after the last change of the form
DRAW_SECONDS = 0.8  # live figures are drawn at most this often
PIXELS_AN_INCH = 84  # of a live figure as shown; drawn finer
GIGABYTE = 1e9
CSS = Path(__file__).parent / "assets" / "panel.css"
_templates = Environment(autoescape=True)
STATUS = _templates.from_string('<span class="nbh-dot {{ kind }}"></span><b>{{ kind }}</b>{{ ": " if text }}{{ text }}')
BAR = _templates.from_string(
    '<div class="nbh-bar {{ extra }}"><i style="width:{{ percent }}%"></i></div>'
    '<span class="nbh-note">{{ text }}</span>'
)
ERROR = _templates.from_string(
    '<div class="nbh-line">{{ line }}</div>{% if trace %}<details class="nbh-details"><summary>Traceback</summary>'
    "<pre>{{ trace }}</pre></details>{% endif %}"
)
VERDICT = _templates.from_string(
    '<div class="nbh-verdict">{% for line in lines %}<div>{{ line }}</div>{% endfor %}</div>'
)
LINES = _templates.from_string(
    '<details class="nbh-details"><summary>The same run by command, by papermill, from Python</summary>'
    "{% for name, text in lines.items() %}{{ name }}<pre>{{ text }}</pre>{% endfor %}</details>"
)
FACTS = _templates.from_string(
    '<details class="nbh-details nbh-facts"{{ " open" if failed }}><summary>{{ held }} of {{ facts|length }}'
    " checked facts hold</summary><ul>{% for fact in facts %}<li>"
    '<span class="{{ "nbh-ok" if fact.ok else "nbh-bad" }}">{{ "✓" if fact.ok else "✗ FAILED" }}</span> {{ fact.says }}'
    ' <span class="nbh-note">({{ fact.saw }})</span></li>{% endfor %}</ul></details>'
)
LINK = _templates.from_string(
    '<a download="{{ name }}" href="data:application/zip;base64,{{ content }}">Save {{ name }}</a> '
    '<span class="nbh-note">({{ "%.1f"|format(megabytes) }} MB)</span>'
)
NOTE = _templates.from_string('<span class="nbh-note">{{ text }}</span>')
_estimators: WeakSet[threading.Timer] = WeakSet()
LINK_BYTES = 20 * 2**20  # a larger archive is named, not put into the page


def guarded(handler: Callable) -> Callable:
    """A widget's handler whose exceptions are shown in the panel: the front end would swallow them."""

    @wraps(handler)
    def safe(self: Panel, *arguments: Any) -> None:
        try:
            handler(self, *arguments)
        except Exception as error:  # noqa: BLE001 - the last place: whatever it was is shown
            self.show_error(error)

    return safe


class Panel:
    """A form, Run and Stop, and the last run: `result` (None before it), `run_now()` for cells, `show()` to display.

    A subclass says what is run (`carry_out`), how long its parts take (`phases`), and what is seen of it (`hear`,
    `figures`, `table`). One run at a time in one kernel, whatever panel started it.
    """

    title, question, promise = "", "", ""
    _one_at_a_time = threading.Lock()
    _running: Panel | None = None
    _drive: Path | None = None  # where runs are copied to, once somebody in Colab said yes
    _drive_asked = False

    def __init__(self, form: Form, root: Path, *, live: bool = True) -> None:
        self.form, self.root, self.live = form, Path(root), live
        self.result: dict | None = None
        self.state = "ready"
        self.stop_asked = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._estimator: threading.Timer | None = None
        self._timetable: durations.Timetable | None = None
        self._says, self._dirty, self._drawn, self._in_cell = "", False, 0.0, False
        self._build()
        form.on_change(self._form_changed)
        self._say("ready", "press Run")
        self.tables.value = NOTE.render(text=self.promise)
        self._estimate_soon()

    # what a subclass says -----------------------------------------------------------------------------------------

    def carry_out(self, config: BaseModel, progress: Callable[[dict], None], should_stop: Callable[[], bool]) -> dict:
        """The run itself; returns its result. Each subclass has its own."""
        raise NotImplementedError

    def config(self) -> BaseModel:
        """What Run runs: what the form says."""
        return self.form.config()

    def phases(self, config: BaseModel) -> dict[str, float]:
        """Seconds of each phase, in order; a phase has the name that progress reports as its stage."""
        raise NotImplementedError

    def forget(self, config: BaseModel) -> None:
        """A run begins: what was seen of the last one goes."""

    def hear(self, now: Mapping[str, Any]) -> None:
        """One report of the run's progress."""

    def figures(self) -> dict[str, plots.Figure]:
        """What is drawn of the run so far."""
        return {}

    def table(self) -> str:
        """The run so far as HTML."""
        return ""

    def lines(self, config: BaseModel) -> Mapping[str, str]:
        """The same run said elsewhere."""
        return {}

    def says(self, now: Mapping[str, Any], done: int | None, total: int | None) -> str:
        """The status line of one report."""
        text = now["stage"].replace("_", " ") + (f": {now['at']}".replace("_", " ") if "at" in now else "")
        return text + (f", {done} of {total}" if total else "")

    def how_far(self) -> tuple[float, float | None]:
        """(share that is done, seconds left or None where that is not known yet) of the run that goes on."""
        table = self._timetable
        return (table.fraction, table.seconds_left) if table else (0.0, None)

    def settled(self) -> None:
        """A run has ended, whichever way."""

    # what is displayed --------------------------------------------------------------------------------------------

    def _build(self) -> None:
        html = ipywidgets.HTML
        self.head = html(
            _templates.from_string(
                '<style>{{ css|safe }}</style><p class="nbh-title">{{ title }}</p><p class="nbh-sub">{{ sub }}</p>'
            ).render(css=CSS.read_text(encoding="utf-8"), title=self.title, sub=self.question)
        )
        self.offer = ipywidgets.HBox([])
        self.run_button = ipywidgets.Button(description="Run", icon="play")
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.status, self.progress, self.gauge, self.estimate = html(), html(), html(), html()
        self.tables, self.verdict, self.facts, self.equivalent, self.error = html(), html(), html(), html(), html()
        self.pictures: dict[str, ipywidgets.Image] = {}
        self.live_box = ipywidgets.VBox([])
        self.extra = ipywidgets.VBox([])  # what a subclass puts between the live part and the facts
        self.download_button = ipywidgets.Button(description="Download", icon="download", disabled=True)
        self.download_link = html()
        self.drive_box = ipywidgets.HBox([])
        names = {
            "run": self.run_button,
            "stop": self.stop_button,
            "status": self.status,
            "progress": self.progress,
            "memory": self.gauge,
            "table": self.tables,
            "live": self.live_box,
            "facts": self.facts,
            "estimate": self.estimate,
            "equivalent": self.equivalent,
            "error": self.error,
        }
        for name, widget in names.items():
            widget.add_class(f"nbh-{name}")
        for widget in (self.progress, self.error, self.verdict, self.facts, self.equivalent, self.tables):
            widget.layout.width = "100%"
        self.gauge.layout = ipywidgets.Layout(width="100%")
        layout = ipywidgets.Layout
        save = ipywidgets.HBox([self.download_button, self.download_link], layout=layout(align_items="center"))
        save.add_class("nbh-download")
        buttons = ipywidgets.HBox(
            [self.run_button, self.stop_button, self.estimate],
            layout=layout(flex_flow="row wrap", align_items="center"),
        )
        left = ipywidgets.VBox([*self.above_form(), self.form.box, *self.below_form()], layout=layout(flex="1 1 300px"))
        left.add_class("nbh-left")
        right = ipywidgets.VBox(
            [
                *(buttons, self.status, self.progress, self.gauge, self.drive_box, self.error, self.verdict),
                *(self.tables, self.live_box, self.extra, self.facts, save, self.equivalent),
            ],
            layout=layout(flex="3 1 420px", min_width="320px"),
        )
        columns = ipywidgets.HBox([left, right], layout=layout(flex_flow="row wrap", align_items="flex-start"))
        columns.add_class("nbh-columns")
        self.box = ipywidgets.VBox([self.head, self.offer, columns])
        self.box.add_class("nbh-panel")
        self.run_button.on_click(self._run_clicked)
        self.stop_button.on_click(self._stop_clicked)
        self.download_button.on_click(self._download_clicked)

    def above_form(self) -> list:
        return []

    def below_form(self) -> list:
        return []

    def show(self, around: ipywidgets.Widget | None = None) -> None:
        """Display the panel, or what is `around` it; where no front end is, its text says so."""
        from IPython.display import display

        if not self.live:
            return
        view = {"version_major": 2, "version_minor": 0, "model_id": (around or self.box).model_id}
        text = "the panel: it needs a running kernel, so run the cells to see it"
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": text}, raw=True)

    def _say(self, kind: str, text: str = "") -> None:
        self.state = kind
        self.status.value = STATUS.render(kind=kind, text=text)

    def show_error(self, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        self.error.value = ERROR.render(line=one_line(error), trace=trace)

    # run and stop -------------------------------------------------------------------------------------------------

    def run_now(self) -> dict:
        """Run what the form says, here and now; returns the result, raises what the run raises.

        What cells, papermill and tests call: the same work as the button. A kernel interrupt is Stop.
        """
        config = self.config()
        self._take_turn()
        self._work(config)
        if self._failure is not None:
            raise self._failure
        return self.result

    @guarded
    def _run_clicked(self, _button: Any = None) -> None:
        if self.busy:
            return  # a second click while running
        config = self.config()
        if not self.before_run():
            return
        self._take_turn()
        self._thread = threading.Thread(target=self._work, args=(config,), name="nbhelpers-run", daemon=True)
        self._thread.start()

    def before_run(self) -> bool:
        """Whether a click on Run may start: in Colab the first one asks whether to keep results in Drive."""
        if runtime.where() != "colab" or Panel._drive_asked:
            return True
        keep, leave = (ipywidgets.Button(layout={"width": "auto"}) for _ in range(2))
        keep.description, leave.description = "Keep results in Drive", "Only on this machine"
        keep.on_click(lambda _button: self._drive_answered(True))
        leave.on_click(lambda _button: self._drive_answered(False))
        question = "A Colab machine goes away with its files. Keep a copy of every run in your Drive?"
        self.drive_box.children = [ipywidgets.HTML(NOTE.render(text=question)), keep, leave]
        return False

    @guarded
    def _drive_answered(self, yes: bool) -> None:
        """Mount Drive here, in the thread of the click: Colab's own question needs it."""
        Panel._drive_asked = True
        said: list[str] = []
        Panel._drive = colab.mount_drive(said.append) if yes else None
        place = f"every run is copied to {Panel._drive}" if Panel._drive else " ".join(said) or "results stay here only"
        self.drive_box.children = [ipywidgets.HTML(NOTE.render(text=place))]
        self._run_clicked()

    def _keep_in_drive(self, before: set[str]) -> None:
        """Copy what this run left, finished or not."""
        for folder in sorted(self.root.iterdir() if Panel._drive and self.root.is_dir() else ()):
            if folder.name not in before:
                earlier.keep(folder, Panel._drive)

    @guarded
    def _stop_clicked(self, _button: Any = None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the run to stop; does nothing where none is going on."""
        if Panel._running is not None:
            running = Panel._running
            running.stop_asked.set()
            running.stop_button.disabled = True
            running._say("stopping", "the step at hand is finished first")

    @property
    def busy(self) -> bool:
        return Panel._running is self

    def wait(self, seconds: float | None = None) -> None:
        """Until the run that a click started has ended."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _take_turn(self) -> None:
        if not Panel._one_at_a_time.acquire(blocking=False):
            self.stop_button.disabled = False
            raise RuntimeError("another run is going on in this kernel; wait for it, or press Stop")
        Panel._running, self._failure = self, None
        self.stop_asked.clear()

    def _work(self, config: BaseModel) -> None:
        ended = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(config, ended), name="nbhelpers-panel", daemon=True)
        kind, text = "failed", ""
        before = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        try:
            self._begin(config)
            if self.live:
                ticker.start()
            self.result = self.carry_out(config, self._hear, self.stop_asked.is_set)
            kind, text = "finished", self._run_name()
        except (Interrupted, KeyboardInterrupt) as error:
            self._failure, kind, text = error, "stopped", str(error) or "by an interrupt of the kernel"
        except Exception as error:  # noqa: BLE001 - shown in the panel, and raised by run_now
            self._failure, text = error, one_line(error)
            self.show_error(error)
        finally:
            ended.set()
            if ticker.ident is not None:
                ticker.join()
            Panel._running = None
            Panel._one_at_a_time.release()
            self._end(config, kind, text, before)

    def _begin(self, config: BaseModel) -> None:
        self.result, self._dirty, self._drawn, self._timetable = None, False, 0.0, None
        self.forget(config)
        # in a cell clicks wait until the cell ends: there the notebook's own interrupt is Stop
        self._in_cell = threading.current_thread() is threading.main_thread()
        self.run_button.disabled, self.stop_button.disabled, self.download_button.disabled = True, self._in_cell, True
        self.form.enable(False)
        shown = (self.error, self.verdict, self.facts, self.download_link, self.tables, self.equivalent, self.estimate)
        for widget in shown:
            widget.value = ""
        self.live_box.children = ()
        self.pictures = {}
        self._says = "starting"
        self._say("running", "starting")

    def _end(self, config: BaseModel, kind: str, text: str, before: set[str]) -> None:
        try:
            self._draw()
            if self.result is not None:
                self._show_result(config)
            self.settled()
            self._keep_in_drive(before)
        except Exception as error:  # noqa: BLE001 - the run is over and recorded; what cannot be drawn is said
            self.show_error(error)
        self.progress.value = "" if kind != "finished" else BAR.render(percent=100, text=self._took())
        self.form.enable(True)
        self.run_button.disabled, self.stop_button.disabled = bool(self.form.refusals()), True
        self._say(kind, text)
        self._estimate_soon()

    def _took(self) -> str:
        return f"took {time.monotonic() - self._timetable.started:.0f} s" if self._timetable else ""

    def _show_result(self, config: BaseModel) -> None:
        facts = self.result["facts"]
        held = sum(fact["ok"] for fact in facts)
        self.verdict.value = VERDICT.render(lines=self.verdicts())
        self.facts.value = FACTS.render(facts=facts, held=held, failed=held < len(facts))
        self.equivalent.value = LINES.render(lines=self.lines(config))
        self.download_button.disabled = False

    def verdicts(self) -> list[str]:
        """What the last run found, in sentences."""
        return [self.result["verdict"]]

    def _run_name(self) -> str:
        return Path(self.result["run_dir"]).name

    # while it runs ------------------------------------------------------------------------------------------------

    def _hear(self, now: dict) -> None:
        stage = now["stage"]
        done, total = now.get("done", now.get("step")), now.get("total", now.get("steps"))
        self._says = self.says(now, done, total)
        if self._timetable is not None:
            self._timetable.hear(now.get("at", stage), done, total)
        self.hear(now)
        self._dirty = True

    def _tick(self, config: BaseModel, ended: threading.Event) -> None:
        self._timetable = durations.Timetable({})
        try:
            started = self._timetable.started
            self._timetable = durations.Timetable(self.phases(config))
            self._timetable.started = started
        except Exception as error:  # noqa: BLE001 - no estimate, and that is said; the run itself goes on
            self.estimate.value = NOTE.render(text=f"no estimate: {one_line(error)}")
        while not ended.wait(TICK_SECONDS):
            try:
                self._show_progress()
                if self._dirty and time.monotonic() - self._drawn > DRAW_SECONDS:
                    self._draw()
            except Exception as error:  # noqa: BLE001 - a picture that fails does not end the run, nor the next picture
                self.show_error(error)

    def _show_progress(self) -> None:
        fraction, left = self.how_far()
        text = f"about {durations.in_words(left)} left" if left is not None else ""
        if self.state == "running":
            hint = " (stop it with the notebook's ■ button)" if self._in_cell else ""
            self._say("running", self._says + hint)
        self.progress.value = BAR.render(percent=f"{100 * fraction:.1f}", text=text)
        self.gauge.value = memory_bar()

    def _draw(self) -> None:
        if not self.live:
            return
        self._dirty, self._drawn = False, time.monotonic()
        self.tables.value = self.table()
        for name, figure in self.figures().items():
            content = plots.png(figure, dots_per_inch=120)
            if name in self.pictures:
                self.pictures[name].value = content
                continue
            self.pictures[name] = ipywidgets.Image(
                value=content, format="png", layout={"max_width": "100%", "align_self": "flex-start"}
            )
            width, _ = figure.get_size_inches()
            self.pictures[name].layout.width = f"{width * PIXELS_AN_INCH:.0f}px"
            self.live_box.children = tuple(self.pictures.values())

    # the form, and what is saved ----------------------------------------------------------------------------------

    def _form_changed(self) -> None:
        refused = bool(self.form.refusals())
        if not self.busy:
            self.run_button.disabled = refused
            text = "a value is refused, see the form" if refused else "the form decides what Run does"
            if self.result is not None:
                text += f"; shown below is {self._run_name()}"
            self._say("ready", text)
            self._estimate_soon()

    def _estimate_soon(self) -> None:
        """Say, a moment after the last change, about how long Run would take."""
        if self._estimator is not None:
            self._estimator.cancel()
        if self.live and not self.form.refusals():
            self._estimator = threading.Timer(ESTIMATE_AFTER_SECONDS, self._show_estimate)
            self._estimator.daemon = True
            _estimators.add(self._estimator)
            self._estimator.start()

    def _show_estimate(self) -> None:
        if self.busy:
            return
        try:
            text = self.estimated(self.config())
        except Exception as error:  # noqa: BLE001 - an estimate that cannot be had is said, and stops nothing
            text = f"how long it takes is not known: {one_line(error)}"
        self.estimate.value = NOTE.render(text=text)

    def estimated(self, config: BaseModel) -> str:
        """About how long a run would take, and where that is known from."""
        return f"about {durations.in_words(sum(self.phases(config).values()))} (estimated)"

    @guarded
    def _download_clicked(self, _button: Any = None) -> None:
        if self.result is None:
            raise RuntimeError("no finished run to download yet; press Run first")
        self.download_button.disabled = True
        self.download_link.value = NOTE.render(text="preparing the archive ...")
        try:
            self.download_link.value = offer_download(self.archive())
        finally:
            self.download_button.disabled = False

    def archive(self) -> Path:
        """The last run as one zip in its folder: record, artefacts and model."""
        return earlier.archive_run(self.result["run_dir"])


@atexit.register
def _end_estimators() -> None:
    """An estimate at work when the interpreter goes away would take it down: torch does not end in mid-call."""
    for estimator in list(_estimators):
        estimator.cancel()
        estimator.join(10)


def offer_download(path: Path) -> str:
    """HTML that lets one save a file: Colab's own download, a link that holds it, or where it lies."""
    if runtime.where() == "colab":
        return NOTE.render(text=colab.download(path))
    size = path.stat().st_size
    if size > LINK_BYTES:
        return _templates.from_string(
            'ready: <code>{{ path }}</code> <span class="nbh-note">({{ mb }} MB: save it from the file browser)</span>'
        ).render(path=str(path), mb=size // 10**6)
    content = base64.b64encode(path.read_bytes()).decode()
    return LINK.render(name=path.name, content=content, megabytes=size / 1e6)


def memory_bar() -> str:
    """Memory in use now: the GPU's where there is one, else this process's share of RAM."""
    now = memory.free()
    if now["gpus"]:
        gpu = now["gpus"][0]
        used, total = gpu["total"] - gpu["free"], gpu["total"]
        text = f"GPU memory {used / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB in use ({gpu['name']})"
    else:
        used, total = memory.resident_bytes(), now["ram_total"]
        text = f"memory: this notebook {used / GIGABYTE:.1f} GB, free {now['ram_free'] / GIGABYTE:.1f}"
        text += f" of {total / GIGABYTE:.1f} GB"
    return BAR.render(percent=f"{100 * used / total:.1f}", text=text, extra="nbh-mem")
