"""What does a person see of a sparsity sweep? What it will cost, coverage and curves as they fill, earlier sweeps.

A sweep is its folder: Stop, a lost kernel or a changed form leave what is done, and Run does what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets
from jinja2 import Environment

from nbhelpers import colab, durations, estimates, models, notebook, plots, runtime, sweep, sweep_cell, workers
from nbhelpers.errors import one_line
from nbhelpers.ledger import Ledger
from nbhelpers.overview_html import coverage_html
from nbhelpers.panel import NOTE, Panel, guarded
from nbhelpers.sweep_cell import Cell
from nbhelpers.sweep_form import (
    METHODS,
    MODES,
    PLAN,
    SweepConfig,
    commands,
    done,
    from_plan,
    new_name,
    papermill_line,
    sweeps,
    tasks_with_answers,
    texts,
    unfinished,
    write_plan,
)
from nbhelpers.sweep_results import SweepResults
from nbhelpers.tasks import BUNDLED
from nbhelpers.tick_boxes import tick_boxes
from nbhelpers.tracking import Interrupted
from nbhelpers.widgets import Form, glossary

THIS, NEW = "the one in the form", "a new one, in a folder of its own"
OFFERED = 12
LAST_LINES = 6
WORDS = {
    "sparsity": "The share of the projections' weights (attention and MLP matrices) that are set to zero.",
    "mask": "Which weights stay. Made once for a model and method; those of growing sparsity are nested.",
    "unstructured": "Single weights go, the smallest first.",
    "structured": "Whole rows go, those with the smallest weights first.",
    "random": "Single weights go by chance: what any other method has to beat.",
    "sparse to dense": "What is learned may fill the zeros again.",
    "sparse to sparse": "The mask holds in training too: the merged model is as sparse as the masked one.",
    "LoRA": "Small matrices beside the weights are trained and merged in at the end.",
    "row, job": "A row is a cell of the grid; rows that cannot differ (no zeros, so no method) share one job.",
}
_templates = Environment(autoescape=True)
BEFORE = _templates.from_string(
    '<div class="nbh-tiles">{% for number, name in tiles %}<div><b>{{ number }}</b>{{ name }}</div>{% endfor %}</div>'
    '<span class="nbh-note">{{ text }}</span>'
)
LAST = _templates.from_string('<ul class="nbh-told">{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>')


class SweepPanel(Panel):
    """`SweepPanel(models="tiny-llama", sparsities="0, 0.5")`: given values stand in the form first, then it decides.

    folder: the sweep's, inside `root` or absolute; None = one of these very settings that is not at its end, else a new
    one. more: fields of SweepConfig that have no parameter of their own.
    """

    title = "Sparse sweep"
    question = "How far can weights be zeroed before a tuned model loses its task?"
    promise = "Here come: how much is done, accuracy against sparsity as it fills, what happened, and what was checked."
    notebook_name = "03_sparse_sweep"
    main = ("models", "tasks", "methods", "sparsities", "modes", "steps", "limit", "data", "seeds", "folder")
    parameters = main

    def __init__(
        self,
        *,
        folder: str | None = None,
        more: Mapping[str, Any] | None = None,
        root: Path | None = None,
        **values: Any,
    ) -> None:
        root = Path(root or notebook.runs_root())
        config = SweepConfig(**values, **(more or {}))
        config = config.model_copy(update={"folder": folder or unfinished(config.plan(), root) or new_name()})
        self.before, self.cover, self.told = (ipywidgets.HTML(layout={"width": "100%"}) for _ in range(3))
        self.choice = ipywidgets.Dropdown(description="sweep", options=[THIS, NEW], layout={"width": "100%"})
        self.choice.add_class("nbh-control")
        self.choice_note = ipywidgets.HTML()
        self.choice_box = ipywidgets.VBox([self.choice, self.choice_note])
        self.choice_box.add_class("nbh-field")
        self.choice_box.add_class("nbh-resume")
        self._forget()
        super().__init__(self._form(config), root, live=runtime.where() != "papermill")
        for name, widget in {"before": self.before, "coverage": self.cover, "events": self.told}.items():
            widget.add_class(f"nbh-{name}")
        self.run_button.tooltip = "does what is missing in the folder"
        self._offer_earlier()
        self.choice.observe(self._chosen, "value")

    def _form(self, config: SweepConfig) -> Form:
        form = Form(SweepConfig, texts(config), main=self.main, choices={"data": [BUNDLED]}, open_choices=("data",))
        tick_boxes(form.controls["models"], models.bundled_names(), others=True)
        tick_boxes(form.controls["tasks"], tasks_with_answers())
        tick_boxes(form.controls["methods"], list(METHODS))
        tick_boxes(form.controls["modes"], MODES)
        return form

    def above_form(self) -> list:
        return [self.choice_box]

    def below_form(self) -> list:
        return [glossary(WORDS)]

    def _build(self) -> None:
        super()._build()
        right = self.box.children[-1].children[1]
        at = right.children.index(self.status)
        parts = [*right.children[:at], self.before, *right.children[at:]]
        at = parts.index(self.error)
        right.children = [*parts[:at], self.cover, self.told, *parts[at:]]

    # before -------------------------------------------------------------------------------------------------------

    def place(self, config: SweepConfig) -> Path:
        """The sweep's folder."""
        return self.root / Path(config.folder).expanduser()

    def counts(self, config: SweepConfig) -> dict[str, Any]:
        """What `sweep.preview` says of the plan, and how many of its jobs are `done` in the folder already."""
        found = sweep.preview(config.plan())
        here = 0
        with contextlib.suppress(ValueError, OSError):  # no sweep there yet: Run says what is wrong with a folder
            here = done(Ledger(self.place(config)), [job["job"] for job in found["order"]])
        return found | {"done": here}

    def estimated(self, config: SweepConfig) -> str:
        """The counts as tiles; then about how long it takes what is missing."""
        found = self.counts(config)
        self.before.value = BEFORE.render(tiles=tiles(found), text=" ".join(remarks(found)))
        if not self.busy and self.result is None:
            self._look(self.place(config))
        left = found["jobs"] - found["done"]
        if not left:
            return "everything of this plan is done in its folder"
        here = f", {found['done']} of {found['jobs']} jobs are done" if found["done"] else ""
        if found["estimated_hours"] is None:
            return "how long it takes is known once model and rows are here" + here
        seconds = 3600 * found["estimated_hours"] * left / found["jobs"]
        return f"about {durations.in_words(seconds)}, estimated from this device's speed{here}"

    def said_before(self) -> str:
        """What Run would do, in a line: the same on every machine."""
        found = self.counts(self.config())
        return ", ".join(f"{number} {name}" for number, name in tiles(found)).replace(" rows, ", " rows -> ", 1)

    def phases(self, config: SweepConfig) -> dict[str, float]:
        hours = sweep.preview(config.plan())["estimated_hours"]
        return {} if hours is None else {"jobs": 3600 * hours}

    # the run ------------------------------------------------------------------------------------------------------

    def carry_out(self, config: SweepConfig, progress: Callable, should_stop: Callable[[], bool]) -> dict:
        folder = self.place(config)
        workers.lay_down(config.plan(), folder)
        write_plan(config, folder)
        self._look(folder)
        try:
            found = sweep.run(config.plan(), folder, progress=progress, should_stop=should_stop)
        finally:
            self._look(folder)
        if found["ended"] == "stopped":
            raise Interrupted(f"{found['done']} of {found['planned']} jobs are done; Run goes on")
        return self.seen.result()

    def one_cell(self) -> Cell:
        """One job of the sweep, carried out in its folder and explained; the sweep need not do it again."""
        config = self.config()
        self._take_turn()
        try:
            return sweep_cell.carry_out(config, self.place(config))
        finally:
            Panel._running = None
            Panel._one_at_a_time.release()
            self._estimate_soon()  # none was made while the job went on

    def results(self) -> SweepResults:
        """What is in the folder that the form names now."""
        return SweepResults(self.place(self.config()))

    # what is seen of it -------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self.seen: SweepResults | None = None
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._fresh, self._job, self._left, self._told_at = False, "", None, 0.0
        self._share, self._ended, self._total = 0.0, 0, 0

    def forget(self, config: SweepConfig) -> None:
        self._forget()
        self.told.value = ""
        self.choice.disabled = True

    def _look(self, folder: Path) -> None:
        """Read the folder, where there is a sweep in it, and draw what it says."""
        self.seen = SweepResults(folder) if (folder / "plan.json").is_file() else None
        self._fresh = self._dirty = True
        if not self.busy:
            self._draw()

    def hear(self, now: Mapping[str, Any]) -> None:
        stage = now["stage"]
        if stage in ("job started", "job ended"):
            self._ended, self._total, self._share = now["done"], now["total"], 0.0
            self._left, self._told_at = now["seconds_left"], time.monotonic()
            self._job = now["name"]
        if stage == "job started":
            self.last.append(f"{now['name']}: started")
        elif stage == "job ended":
            what = f"{now['failure'].upper()}: {now['error']}" if now.get("failure") else now["status"]
            self.last.append(f"{now['name']}: {what} ({now['done']} of {now['total']})")
            self._look(self.seen.folder)
            self._mirror(now["job"])
        elif stage == "measured":
            self.last.append(f"{now['at']}: accuracy {now['accuracy']:.3f}")
        elif "step" in now:
            self._share = now["step"] / now["steps"]

    def says(self, now: Mapping[str, Any], done: int | None, total: int | None) -> str:
        inner = "" if now["stage"].startswith("job ") else f", {super().says(now, done, total)}"
        name = now.get("name") or self._job
        at = self._ended + 1 if now["stage"] != "job ended" else now["done"]
        return f"job {at} of {self._total or now.get('total')}, {name}{inner}"

    def how_far(self) -> tuple[float, float | None]:
        if not self._total:
            return 0.0, None
        known = sum(self._timetable.phases.values()) if self._timetable else 0.0
        a_job = known / self._total if known else None
        others = self._left
        if others is None and a_job is not None:  # nothing was measured yet
            others = a_job * (self._total - self._ended - 1)
        left = None if others is None or a_job is None else others + a_job * (1 - self._share)
        return (self._ended + self._share) / self._total, left

    def figures(self) -> dict[str, plots.Figure]:
        return {} if self.seen is None else self.seen.curves()

    def table(self) -> str:
        return "" if self.seen is None else self.seen.table()

    def _draw(self) -> None:
        if not self.live:
            return
        self.told.value = LAST.render(lines=list(self.last)) if self.last else ""
        if not self._fresh:
            self._dirty, self._drawn = False, time.monotonic()
            return
        self._fresh = False
        self.cover.value = "" if self.seen is None else coverage_html(self.seen.coverage)
        self._keep_pictures()
        super()._draw()

    def _keep_pictures(self) -> None:
        """Pictures of another plan go."""
        wanted = set() if self.seen is None else set(self.figures())
        if set(self.pictures) - wanted:
            self.pictures, self.live_box.children = {}, ()

    def verdicts(self) -> list[str]:
        return self.result["verdicts"]

    def lines(self, config: SweepConfig) -> Mapping[str, str]:
        folder = os.path.relpath(self.place(config))
        python = f"from nbhelpers import sweep\nsweep.run({f'{folder}/{PLAN}'!r}, {folder!r})"
        return commands(folder) | {
            "papermill": papermill_line(config, self.notebook_name, self.parameters),
            "Python": python,
        }

    def elsewhere(self) -> str:
        """The plan as it stands in its file, and the commands that carry it out, said from the folder of the runs."""
        folder = self.place(self.config())
        said = "\n".join(f"# {name}\n{line}" for name, line in commands(folder.name).items())
        return f"{(folder / PLAN).read_text(encoding='utf-8')}\n{said}"

    def settled(self) -> None:
        self.choice.disabled = False
        self._offer_earlier()

    def archive(self) -> Path:
        """Report, runs and masks of the sweep as one zip in its folder."""
        done = SweepResults(Path(self.result["run_dir"]))
        done.save()
        return done.archive()

    # earlier sweeps -----------------------------------------------------------------------------------------------

    def _offer_earlier(self) -> None:
        found = sweeps(self.root)
        drive = colab.drive_folder()
        found += [] if drive is None else [one for one in sweeps(drive) if not (self.root / one.folder.name).exists()]
        self.earlier = {_label(ledger): ledger for ledger in found[:OFFERED]}
        self.choice.options = [THIS, *self.earlier, NEW]
        self.choice_box.layout.display = "" if self.earlier else "none"
        open_ = sum(ledger.coverage()["missing"] > 0 for ledger in self.earlier.values())
        self.choice_note.value = NOTE.render(text=f"{len(found)} here, {open_} not at the end")

    @guarded
    def _chosen(self, _change: Any = None) -> None:
        """Put an earlier sweep into the form: what it holds is shown, and Run does what is missing."""
        if self.choice.value == THIS:
            return
        self.result, self.verdict.value, self.facts.value, self.download_button.disabled = None, "", "", True
        if self.choice.value == NEW:
            self.form.put({"folder": new_name()})
            return
        ledger = self.earlier[self.choice.value]
        inside = ledger.folder.parent == self.root
        folder = ledger.folder.name if inside else str(ledger.folder)
        config = from_plan(ledger.plan, folder)
        if config is None:
            self._look(ledger.folder)
            plan = ledger.folder / workers.FOLDER / workers.PLAN
            named = shlex.quote(str(plan)) if plan.is_file() else "PLAN, the file that it was begun with,"
            text = "its plan was written elsewhere and is no form's: shown here, it goes on by nbhelpers sweep run "
            self.choice_note.value = NOTE.render(text=f"{text}{named} --out {shlex.quote(str(ledger.folder))}")
            return
        self.form.put(texts(config))
        self.choice_note.value = NOTE.render(text="its settings stand in the form: Run does what is missing")

    # Drive --------------------------------------------------------------------------------------------------------

    def _keep_in_drive(self, before: set[str]) -> None:
        """Done after each job: a machine of Colab may go away before the last one."""

    def _mirror(self, job: str) -> None:
        """Copy a finished job and the ledger, so that the sweep can go on from its copy in Drive."""
        if Panel._drive is None:
            return
        source, target = self.seen.folder, Panel._drive / self.seen.folder.name
        if source.resolve() == target.resolve():  # it goes on in Drive itself
            return
        try:
            self._copy(job, source, target)
        except (OSError, shutil.Error) as error:  # the sweep goes on without its copy
            self.last.append(f"not copied to Drive: {one_line(error)}")

    def _copy(self, job: str, source: Path, target: Path) -> None:
        for path in (*source.glob(f"runs/{job}-*"), *source.glob("runs/.masks"), source / workers.FOLDER):
            if path.is_dir():
                shutil.copytree(path, target / path.relative_to(source), dirs_exist_ok=True)
        for name in ("plan.json", "ledger.jsonl", PLAN):
            shutil.copy2(source / name, target / name)


def _label(ledger: Ledger) -> str:
    found = ledger.coverage()
    failed = f", {found['failed']} failed" if found["failed"] else ""
    return f"{ledger.folder.name} ({found['done']} of {found['planned']} done{failed})"


def tiles(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(number, what it counts) of a preview, in the order in which one follows from the other."""
    price = found["price"]
    counts = {
        "rows": found["rows"],
        **{name: price[name] for name in ("trainings", "evaluations", "loads", "scorings")},
    }
    told = [(f"{count:,}", name if count != 1 else name.removesuffix("s")) for name, count in counts.items()]
    downloads, disk = price["downloads"], price.get("disk_bytes")
    if downloads:
        known = [size for size in downloads.values() if size is not None]
        size = estimates.megabytes(sum(known)) + (" and more" if len(known) < len(downloads) else "")
        told.append((size if known else "?", "to download"))
    return [*told, *([(estimates.megabytes(disk), "on disk")] if disk else [])]


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What the numbers do not say by themselves."""
    told = []
    if found["aliases"]:
        told.append(f"{found['aliases']} rows have no zeros, so method and mode change nothing: others' jobs do them.")
    if unknown := [name for name, size in found["price"]["downloads"].items() if size is None]:
        told.append(f"How large {', '.join(unknown)} is is not known before.")
    if not found["price"]["downloads"]:
        told.append("Nothing to download.")
    told += found.get("notes", [])
    return told
