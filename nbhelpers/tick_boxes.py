"""How are several values of a list chosen in a form? By ticks; the text with commas between them stays the truth."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets

from nbhelpers.sweep_form import listed, written
from nbhelpers.widgets import Control


def tick_boxes(control: Control, choices: Sequence[str], *, others: bool = False) -> list[ipywidgets.Checkbox]:
    """Put a box for each choice above the text field of a control: a tick writes its name, a written name is ticked.

    others: the text field is always there, for names that no box has; else only while it holds such a name.
    """
    text = control.parts[0]
    boxes = [ipywidgets.Checkbox(description=name, indent=False, layout={"width": "auto"}) for name in choices]
    moving = [False]

    def show() -> None:
        names = listed(text.value)
        moving[0] = True
        for box in boxes:
            box.value = box.description in names
        moving[0] = False
        foreign = set(names) - set(choices)
        text.layout.display = "flex" if others or foreign or not names else "none"

    def ticked(_change: object) -> None:
        if moving[0]:
            return
        names = listed(text.value)
        kept = [name for name in names if name not in choices]
        text.value = written([*(box.description for box in boxes if box.value), *kept])

    for box in boxes:
        box.observe(ticked, "value")
    text.observe(lambda _change: show(), "value")
    label = ipywidgets.HTML(f'<span class="nbh-tickname">{escape(control.name.replace("_", " "))}</span>')
    text.description = ""
    text.placeholder = "names with commas between them"
    ticks = ipywidgets.HBox(boxes, layout={"flex_flow": "row wrap"})
    ticks.add_class("nbh-ticks")
    control.box.children = [label, ticks, *control.box.children]
    control.parts = [*control.parts, *boxes]
    show()
    return boxes
