"""What happens if exactly these heads are closed? Every head as a button, measured at a click."""

from __future__ import annotations

import threading

import ipywidgets
from jinja2 import Environment

from nbhelpers.errors import one_line
from nbhelpers.experiments import PruningConfig
from nbhelpers.panel import Panel
from nbhelpers.stats import digits
from nbhelpers.tracking import Interrupted
from nbhelpers.tryout import Tryout

MOST_BUTTONS = 400  # heads shown as buttons at once; a model with more shows a few layers at a time
TRIED = Environment(autoescape=True).from_string(
    "<div><b>{{ now }}</b> with {{ closed }} of {{ total }} heads closed; {{ all_open }} with all open "
    '<span class="nbh-note">(perplexity on the first {{ windows }} test windows, not fine-tuned)</span>'
    '</div><div class="nbh-sample">{{ sample }}</div>'
)
NOTE = Environment(autoescape=True).from_string('<span class="nbh-note">{{ text }}</span>')
SECTION = '<div class="nbh-section">Heads</div>'


class HeadMap:
    """Every head as a button, coloured by importance: click one and see perplexity and text change.

    The model is loaded at the first click and given back before the next run.
    """

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self.closed: set[tuple[int, int]] = set()
        self.chosen: set[tuple[int, int]] = set()  # by the run
        self.scores: list[list[float]] = []
        self.buttons: dict[tuple[int, int], ipywidgets.Button] = {}
        self._tryout: Tryout | None = None
        self._wanted = threading.Event()
        self._guard = threading.Lock()
        self._worker: threading.Thread | None = None
        self.note, self.tried, self.grid = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.VBox([])
        self.begin = ipywidgets.Button(
            description="Try heads by hand", layout=ipywidgets.Layout(width="auto"), disabled=False
        )
        self.reset = ipywidgets.Button(description="As the run chose", layout=ipywidgets.Layout(width="auto"))
        self.open_all = ipywidgets.Button(description="Open all", layout=ipywidgets.Layout(width="auto"))
        self.layers = ipywidgets.Dropdown(description="layers", options=[("all", 0)])
        self.begin.on_click(lambda _b: self._clicked(None))
        self.reset.on_click(lambda _b: self._clicked(set(self.chosen)))
        self.open_all.on_click(lambda _b: self._clicked(set()))
        self.layers.observe(lambda _change: self._draw_grid(), "value")
        buttons = ipywidgets.HBox([self.begin, self.reset, self.open_all], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([ipywidgets.HTML(SECTION), self.note, self.layers, self.grid, buttons, self.tried])
        self.box.add_class("nbh-heads")
        for widget in (self.note, self.tried):
            widget.layout.width = "100%"
        self._show_controls()

    def forget(self) -> None:
        """A run begins: its model must have the memory, its scores come later."""
        self._release()
        self.closed, self.chosen, self.scores, self.buttons = set(), set(), [], {}
        self.grid.children, self.tried.value = (), ""
        self.note.value = NOTE.render(text="After a run: the map of its scores. Or load the model and try by hand.")
        self.enable(not self.panel_is_busy())

    def panel_is_busy(self) -> bool:
        return Panel._running is not None

    def enable(self, on: bool) -> None:
        for button in (*self.buttons.values(), self.begin, self.reset, self.open_all):
            button.disabled = not on
        self._show_controls()

    def _show_controls(self) -> None:
        there = bool(self.buttons)
        self.begin.layout.display = "none" if there else ""
        self.reset.layout.display = "" if there and self.chosen else "none"
        self.open_all.layout.display = "" if there else "none"
        self.layers.layout.display = "" if len(self.layers.options) > 1 else "none"

    def show_scores(self, scores: list[list[float]], closed: list[list[int]]) -> None:
        """The map as the run sees it."""
        self.scores = scores
        self.chosen = {(layer, head) for layer, head in closed}
        self.closed = set(self.chosen)
        if scores and self.panel.live:
            self._lay_out(len(scores), len(scores[0]))
        self.note.value = NOTE.render(
            text=f"{len(self.chosen)} heads closed (✕); darker = more important to {self.panel.seen['strategy']}. "
            "After the run, click heads off and on and see perplexity and text change."
        )

    def _lay_out(self, layers: int, heads: int) -> None:
        page = max(1, MOST_BUTTONS // heads)
        self.size, self.page = (layers, heads), page
        self.layers.options = [(f"{at} to {min(at + page, layers) - 1}", at) for at in range(0, layers, page)]
        self._draw_grid()

    def _draw_grid(self) -> None:
        if not hasattr(self, "size"):
            return
        (layers, heads), first = self.size, self.layers.value or 0
        self.buttons, rows = {}, []
        for layer in range(first, min(first + self.page, layers)):
            row = [ipywidgets.HTML(f'<span class="nbh-layer">layer {layer}</span>', layout={"width": "54px"})]
            for head in range(heads):
                button = ipywidgets.Button(layout={"width": "32px", "height": "28px"}, disabled=self.panel_is_busy())
                button.add_class("nbh-head")
                button.on_click(lambda _b, at=(layer, head): self._toggle(at))
                self.buttons[layer, head] = button
                row.append(button)
            rows.append(ipywidgets.HBox(row, layout={"flex_flow": "row wrap", "align_items": "center"}))
        self._paint()
        self.grid.children = rows
        self._show_controls()

    def _paint(self) -> None:
        flat = [value for row in self.scores for value in row]
        low, high = (min(flat), max(flat)) if flat else (0.0, 1.0)
        for (layer, head), button in self.buttons.items():
            closed = (layer, head) in self.closed
            share = (self.scores[layer][head] - low) / (high - low) if flat and high > low else 0.15
            button.description = "✕" if closed else str(head)
            button.style.button_color = "#ffffff" if closed else shade(share)
            (button.add_class if closed else button.remove_class)("nbh-closed")
            (button.add_class if share > 0.62 else button.remove_class)("nbh-dark")
            (button.remove_class if share > 0.62 else button.add_class)("nbh-light")

    def _toggle(self, head: tuple[int, int]) -> None:
        self._clicked(self.closed ^ {head})

    def _clicked(self, closed: set[tuple[int, int]] | None) -> None:
        if self.panel_is_busy():
            return
        try:
            if closed is not None:
                self.closed = closed
                self._paint()
            self._wanted.set()
            self.tried.value = NOTE.render(text="measuring ..." if self._tryout else "loading the model ...")
            with self._guard:
                if self._worker is None or not self._worker.is_alive():
                    self._worker = threading.Thread(target=self._work, name="nbhelpers-tryout", daemon=True)
                    self._worker.start()
        except Exception as error:  # noqa: BLE001 - a callback's own output is shown nowhere
            self.panel.show_error(error)

    def _work(self) -> None:
        """Measure what is wanted now until nothing new is wanted."""
        try:
            while self._wanted.is_set() and not self.panel_is_busy():
                self._wanted.clear()
                if self._tryout is None:
                    self._tryout = Tryout(self._config())
                geo = self._tryout.geometry
                if not self.buttons:
                    self._lay_out(geo.layers, geo.heads)
                try:
                    found = self._tryout.measure(sorted(self.closed), self._overtaken)
                except Interrupted:
                    continue  # another click came
                self.tried.value = TRIED.render(
                    now=digits(found.perplexity),
                    closed=len(found.closed),
                    total=geo.total,
                    all_open=digits(found.all_open),
                    windows=found.windows,
                    sample=found.sample,
                )
        except Exception as error:  # noqa: BLE001 - shown where the number would stand
            self.tried.value = NOTE.render(text=f"not measured: {one_line(error)}")

    def _overtaken(self) -> bool:
        return self._wanted.is_set() or self.panel_is_busy()

    def _config(self) -> PruningConfig:
        """The model and text of the last run, else those in the form."""
        if self.panel.result is None:
            return self.panel.form.config()
        return self.panel.form.config().model_copy(
            update={"model": self.panel.result["model"], "text": self.panel.result["text"]["source"]}
        )

    def _release(self) -> None:
        tryout, self._tryout = self._tryout, None
        if self._worker is not None and self._worker.is_alive():
            self._wanted.clear()
            self._worker.join(10)
        if tryout is not None:
            tryout.close()


def shade(share: float) -> str:
    """Pale to blue: the colour of an importance between 0 and 1."""
    low, high = (232, 240, 247), (0, 84, 140)
    mixed = [round(a + (b - a) * min(1.0, max(0.0, share)) ** 0.8) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)
