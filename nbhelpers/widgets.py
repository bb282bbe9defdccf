"""How does a config become a form, and a form a config? One control a field, with its bounds and its help as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import ipywidgets
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nbhelpers.errors import refusal

NONE = "none"  # the entry of an open choice that may be left out
OTHER = "other ..."  # the entry of an open choice under which one's own text is written
MOST = 2**53 - 1  # what a number field without an upper bound takes: the largest whole number a browser keeps
SLIDER_STEPS = 1000  # whole numbers with more values than this get a field to type in
WIDE = ipywidgets.Layout(width="100%")


@dataclass
class Control:
    """One field of the form: its widgets, how its value is read and set, and where it is refused."""

    name: str
    box: ipywidgets.Widget
    get: Callable[[], Any]
    put: Callable[[Any], None]
    parts: Sequence[ipywidgets.Widget]
    refusal: ipywidgets.HTML = field(default_factory=lambda: ipywidgets.HTML(layout=ipywidgets.Layout(display="none")))

    def refuse(self, message: str | None) -> None:
        """Show beside the control why its value cannot be; None: it can."""
        self.refusal.value = f'<span class="nbh-refused" role="alert">{escape(message)}</span>' if message else ""
        self.refusal.layout.display = "block" if message else "none"


class Form:
    """The controls of one config class. `config()` is what they say now, validated; bad values are refused in place.

    main: fields shown at once, in this order; the others fold away under "more settings". choices: field -> its values
    where they are not in the config class itself; those in `open_choices` also take one's own text.
    """

    def __init__(
        self,
        config_class: type[BaseModel],
        first: Mapping[str, Any],
        *,
        main: Sequence[str],
        choices: Mapping[str, Sequence[str]] | None = None,
        open_choices: Sequence[str] = (),
        hidden: Sequence[str] = (),
    ) -> None:
        self.config_class = config_class
        self._kept = {name: first[name] for name in hidden if name in first}
        self._listeners: list[Callable[[], None]] = []
        self.controls: dict[str, Control] = {}
        fields = config_class.model_fields
        for name in [*main, *(name for name in fields if name not in (*main, *hidden))]:
            value = first.get(name, fields[name].default)
            values = (choices or {}).get(name)
            self.controls[name] = make_control(name, fields[name], value, values, name in open_choices)
        rest = [control.box for name, control in self.controls.items() if name not in main]
        folded = ipywidgets.VBox(rest)
        folded.add_class("nbh-form")
        more = ipywidgets.Accordion(children=[folded], selected_index=None, layout=WIDE)
        more.set_title(0, "More settings")
        more.add_class("nbh-more")
        self.box = ipywidgets.VBox([*(self.controls[name].box for name in main), more])
        self.box.add_class("nbh-form")
        for control in self.controls.values():
            for part in control.parts:
                part.observe(self._changed, "value")
        self._changed()

    def values(self) -> dict[str, Any]:
        return self._kept | {name: control.get() for name, control in self.controls.items()}

    def config(self) -> BaseModel:
        """The config that the controls say; pydantic's ValidationError where they say none."""
        return self.config_class(**self.values())

    def put(self, values: Mapping[str, Any]) -> None:
        """Set controls; LookupError for a field that the form does not have."""
        for name in values:
            if name not in self.controls:
                raise LookupError(f"the form has no field {name!r}, it has: {', '.join(self.controls)}")
        for name, value in values.items():
            self.controls[name].put(value)

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def refusals(self) -> dict[str, str]:
        """{field: why its value is refused} of the values now, {} where they make a config."""
        try:
            self.config()
        except ValidationError as error:
            return {
                str(found["loc"][0] if found["loc"] else ""): refusal(found, named=False) for found in error.errors()
            }
        return {}

    def enable(self, on: bool) -> None:
        for control in self.controls.values():
            for part in control.parts:
                part.disabled = not on

    def _changed(self, _change: Any = None) -> None:
        found = self.refusals()
        for name, control in self.controls.items():
            control.refuse(found.get(name))
        for listener in self._listeners:
            listener()


def make_control(
    name: str, info: FieldInfo, value: Any, choices: Sequence[str] | None = None, is_open: bool = False
) -> Control:
    """The control of one field, chosen by its type and bounds (a table in NOTEBOOKS: core widgets only)."""
    kinds = [kind for kind in _parts(info.annotation) if kind is not NoneType]
    optional = len(kinds) < len(_parts(info.annotation))
    low, high = bounds(info)
    label = name.replace("_", " ")
    literals = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    if is_open and choices:
        return _open_choice(name, info, value, choices, optional)
    if literals or choices:
        widget = ipywidgets.Dropdown(options=list(literals or choices or ()), value=value, description=label)
    elif optional:
        widget = ipywidgets.Text(value="" if value is None else str(value), description=label, continuous_update=False)
        return _control(name, info, widget, lambda: read_optional(widget.value), lambda new: _put_text(widget, new))
    elif kinds == [bool]:
        widget = ipywidgets.Checkbox(value=value, description=label, indent=False)
    elif kinds == [int] and high is not None and high - (low or 0) <= SLIDER_STEPS:
        widget = ipywidgets.IntSlider(value=value, min=int(low or 0), max=int(high), description=label)
    elif kinds == [int]:
        top = int(min(MOST, high if high is not None else MOST))
        widget = ipywidgets.BoundedIntText(value=value, min=int(low or 0), max=top, description=label)
    elif kinds == [float] and low is not None and high is not None:
        step = (high - low) / 20
        widget = ipywidgets.FloatSlider(
            value=value, min=low, max=high, step=step, description=label, readout_format=".2f"
        )
        return _control(name, info, widget, lambda: round(widget.value, 6), lambda new: _put(widget, new))
    else:
        widget = ipywidgets.Text(value=str(value), description=label, continuous_update=False)
        return _control(name, info, widget, lambda: widget.value, lambda new: _put_text(widget, new))
    return _control(name, info, widget, lambda: widget.value, lambda new: _put(widget, new))


def bounds(info: FieldInfo) -> tuple[float | None, float | None]:
    """(lowest, highest) value of a number field as its config class says; None where it has no bound."""
    low = next((getattr(m, at) for m in info.metadata for at in ("ge", "gt") if hasattr(m, at)), None)
    high = next((getattr(m, at) for m in info.metadata for at in ("le", "lt") if hasattr(m, at)), None)
    below = any(hasattr(m, "lt") for m in info.metadata)
    return low, high - 1 if below and isinstance(high, int) else high


def read_optional(text: str) -> Any:
    """What is written in a field that may be empty: None, a number, or the text itself (the config refuses nonsense).

    >>> read_optional(" "), read_optional("12"), read_optional("1e-3"), read_optional("cpu")
    (None, 12, 0.001, 'cpu')
    """
    text = text.strip()
    if not text or text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _put(widget: Any, value: Any) -> None:
    widget.value = value


def _put_text(widget: Any, value: Any) -> None:
    widget.value = "" if value is None else str(value)


def _control(
    name: str,
    info: FieldInfo,
    widget: Any,
    get: Callable[[], Any],
    put: Callable[[Any], None],
    more: Sequence[Any] = (),
) -> Control:
    widget.layout.width = "100%"
    widget.add_class("nbh-control")
    help_line = ipywidgets.HTML(f'<span class="nbh-help">{escape(info.description or "")}</span>')
    control = Control(name, ipywidgets.VBox(), get, put, [widget, *more])
    control.box.children = [widget, *more, help_line, control.refusal]
    control.box.add_class("nbh-field")
    control.box.add_class(f"nbh-field-{name}")
    return control


def _open_choice(
    name: str, info: FieldInfo, value: str | None, choices: Sequence[str], optional: bool = False
) -> Control:
    """A dropdown whose last entry opens a text field for a value of one's own; optional: its first one is None."""
    choices = [*([NONE] if optional else []), *choices]
    own = ipywidgets.Text(continuous_update=False, placeholder=info.description or "", layout=ipywidgets.Layout())
    own.layout.width = "100%"
    own.add_class("nbh-own")
    dropdown = ipywidgets.Dropdown(options=[*choices, OTHER], description=name.replace("_", " "))

    def show(_change: Any = None) -> None:
        own.layout.display = "flex" if dropdown.value == OTHER else "none"

    def read() -> str | None:
        chosen = own.value.strip() if dropdown.value == OTHER else dropdown.value
        return None if optional and chosen == NONE else chosen

    def put(new: str | None) -> None:
        new = NONE if new is None else new
        known = new in choices
        own.value = "" if known else new
        dropdown.value = new if known else OTHER

    dropdown.observe(show, "value")
    control = _control(name, info, dropdown, read, put, [own])
    put(value)
    show()
    return control


def glossary(words: Mapping[str, str]) -> ipywidgets.HTML:
    """Words and what they mean here, folded away."""
    rows = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())
    box = ipywidgets.HTML(f'<details class="nbh-details"><summary>Words used here</summary><dl>{rows}</dl></details>')
    box.add_class("nbh-glossary")
    return box
