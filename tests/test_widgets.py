"""Does the form say what the config class says, refuse what it refuses, and give back what was put in?"""

from __future__ import annotations

from typing import Literal

import ipywidgets
import pytest
from pydantic import BaseModel, Field

from nbhelpers import widgets
from nbhelpers.experiments import PruningConfig
from nbhelpers.heads import STRATEGIES


class Settings(BaseModel):
    """One field of every kind."""

    share: float = Field(0.3, ge=0, le=1, description="share of all")
    layers: int = Field(2, ge=1, le=12, description="how many")
    steps: int = Field(40, ge=0, description="no upper bound")
    seed: int = Field(0, ge=0, lt=2**32, description="a wide range")
    whole: bool = Field(False, description="yes or no")
    method: Literal["full", "lora"] = Field("full", description="one of two")
    rate: float | None = Field(None, gt=0, le=1, description="may be empty")
    device: str | None = Field(None, description="may be empty too")
    model: str = Field("a", description="a name <or> a folder")
    name: str = "x"


def form(**first) -> widgets.Form:
    return widgets.Form(
        Settings,
        Settings(**first).model_dump(),
        main=["model", "share"],
        choices={"model": ["a", "b"]},
        open_choices=["model"],
        hidden=["name"],
    )


@pytest.mark.parametrize(
    "name, kind",
    [
        ("share", ipywidgets.FloatSlider),
        ("layers", ipywidgets.IntSlider),
        ("steps", ipywidgets.BoundedIntText),
        ("seed", ipywidgets.BoundedIntText),
        ("whole", ipywidgets.Checkbox),
        ("method", ipywidgets.Dropdown),
        ("rate", ipywidgets.Text),
        ("device", ipywidgets.Text),
        ("model", ipywidgets.Dropdown),
    ],
)
def test_every_kind_of_field_gets_its_control(name, kind):
    assert type(form().controls[name].parts[0]) is kind


def test_sliders_have_the_bounds_of_the_class():
    controls = form().controls
    share, layers, seed = (controls[name].parts[0] for name in ("share", "layers", "seed"))
    assert (share.min, share.max, layers.min, layers.max) == (0, 1, 1, 12)
    assert (controls["steps"].parts[0].min, controls["steps"].parts[0].max) == (0, widgets.MOST)
    assert widgets.bounds(Settings.model_fields["seed"]) == (0, 2**32 - 1) and seed.min == 0


def test_a_slider_cannot_be_set_out_of_range():
    made = form()
    made.controls["share"].parts[0].value = 1.5
    assert made.config().share == 1.0 and made.refusals() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": 0.15, "steps": 2000, "whole": True, "method": "lora"},
        {"rate": 0.001, "device": "cpu", "model": "some/folder"},
        {"model": "b", "layers": 12, "seed": 7, "name": "y"},
    ],
)
def test_what_goes_into_the_form_comes_out_of_it(changes):
    assert form(**changes).config() == Settings(**changes)
    later = form()
    later.put({name: value for name, value in changes.items() if name != "name"})
    assert later.config() == Settings(**(changes | {"name": "x"}))


def test_arrow_keys_leave_no_rounding_in_the_value():
    made = form()
    made.controls["share"].parts[0].value = 0.30000000000000004
    assert made.config().share == 0.3


def test_a_refused_value_is_said_beside_its_control_alone():
    made = form()
    made.controls["rate"].parts[0].value = "-1"
    assert made.refusals() == {"rate": "must be greater than 0, got -1"}
    assert "must be greater than 0, got -1" in made.controls["rate"].refusal.value
    assert made.controls["rate"].refusal.layout.display == "block"
    assert made.controls["device"].refusal.layout.display == "none"
    made.controls["rate"].parts[0].value = "0.5"
    assert made.refusals() == {} and made.controls["rate"].refusal.layout.display == "none"


def test_nonsense_in_a_number_field_is_refused_and_not_read_as_empty():
    made = form()
    made.controls["rate"].parts[0].value = "fast<b>"
    assert "fast&lt;b&gt;" in made.controls["rate"].refusal.value


@pytest.mark.parametrize(
    "text, value", [("", None), (" none ", None), ("12", 12), ("1e-3", 0.001), ("cpu", "cpu"), ("0", 0)]
)
def test_an_optional_field_reads_what_is_written(text, value):
    assert widgets.read_optional(text) == value


def test_ones_own_model_opens_a_field_to_write_in():
    made = form()
    dropdown, own = made.controls["model"].parts
    assert own.layout.display == "none"
    dropdown.value = widgets.OTHER
    own.value = " runs/mine "
    assert own.layout.display == "flex" and made.config().model == "runs/mine"


def test_a_listener_hears_a_change():
    heard, made = [], form()
    made.on_change(lambda: heard.append(made.values()["steps"]))
    made.put({"steps": 3})
    assert heard == [3]


def test_putting_an_unknown_field_changes_nothing():
    made = form()
    with pytest.raises(LookupError, match="no field 'stepz'"):
        made.put({"steps": 3, "stepz": 4})
    assert made.config().steps == 40


def test_help_is_the_description_as_text():
    inside = form().controls["model"].box.children
    assert any("a name &lt;or&gt; a folder" in getattr(part, "value", "") for part in inside)


def test_every_field_of_the_pruning_config_has_a_control_and_survives_the_form():
    config = PruningConfig(level=0.35, learning_rate=0.002, sample_prompt="Once", strategy="entropy")
    made = widgets.Form(
        PruningConfig, config.model_dump(), main=["level"], choices={"strategy": list(STRATEGIES)}, hidden=["name"]
    )
    assert set(made.controls) == set(PruningConfig.model_fields) - {"name"}
    assert made.config() == config
    assert list(made.controls["strategy"].parts[0].options) == list(STRATEGIES)
