"""Which sweep does a form say? Lists of models, tasks, methods, sparsities, modes and seeds, and the plan they make."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, create_model, field_validator

from nbhelpers import equivalents, grid, jobkinds, mask_sets, masks, models, tasks, workers
from nbhelpers.ledger import Ledger
from nbhelpers.records import plain, write_atomic
from nbhelpers.registry import unknown
from nbhelpers.sparsity import SparsityConfig
from nbhelpers.strict import StrictConfig

KIND = jobkinds.sparsity.__name__  # what such a sweep's plan says it is
NAME = "sweep"
PLAN = "plan.yaml"
METHODS: dict[str, dict[str, str]] = {  # those of the classic plan, then every other way to rank weights
    "unstructured": {"pattern": "unstructured", "importance": "magnitude"},
    "structured": {"pattern": "structured", "importance": "magnitude"},
    "random": {"pattern": "unstructured", "importance": "random"},
    "nm": {"pattern": "nm", "importance": "magnitude"},
}
METHODS |= {
    name: {"pattern": "unstructured", "importance": name}
    for name in mask_sets.IMPORTANCES
    if name not in ("magnitude", "random")
}
MODES = ("sparse_to_dense", "sparse_to_sparse")
ALIASES = [{"when": {"sparsity": 0}, "ignore": ["method", "mode"]}]
SINGLE = {"models": "model", "tasks": "task", "seeds": "seed"}  # with one value they stand in the plan's base
SHARED = (  # fields that every job of the sweep has alike: those of a job, with its bounds and help
    *("steps", "limit", "data", "train_data", "shots", "learning_rate", "batch_size", "micro_batch_size"),
    *("lora_rank", "lora_alpha", "gradient_checkpointing", "checkpoint_every", "validations", "window"),
    *("calibration_rows", "keep_model", "dtype", "device"),
)


def listed(value: Any) -> Any:
    """The values of a text with commas between them, of a list, or the one value itself.

    >>> listed("0, 0.5"), listed(0.5), listed([1, 2])
    (['0', '0.5'], [0.5], [1, 2])
    """
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Sequence) else [value]


def written(values: Sequence[Any]) -> str:
    """Values as a form and a parameter take them.

    >>> written([0.0, 0.5]), written(["a", "b"])
    ('0, 0.5', 'a, b')
    """
    return ", ".join(repr(value).removesuffix(".0") if isinstance(value, float) else str(value) for value in values)


def _several(kind: type) -> Any:
    return Annotated[tuple[kind, ...], BeforeValidator(listed)]


def tasks_with_answers() -> list[str]:
    """Tasks whose share of right answers can be measured."""
    return [name for name in tasks.TASKS if tasks.find(name).kind != "rolling"]


class _Lists(StrictConfig):
    """What differs between the jobs of a sweep."""

    models: _several(str) = Field(("tiny-llama",), description="bundled names, local folders or hub ids")
    tasks: _several(str) = Field(("hellaswag",), description="each model is tuned and measured on each")
    methods: _several(str) = Field(("unstructured", "random"), description="what ranks the weights, and what goes")
    sparsities: _several(float) = Field((0, 0.5, 0.9), description="shares of the projections' weights that go, 0-1")
    modes: _several(str) = Field(MODES, description="whether what is learned may fill the zeros again (dense) or not")
    seeds: _several(int) = Field((0,), description="random scores, data order and adapters")

    @field_validator("models", "tasks", "methods", "sparsities", "modes", "seeds")
    @classmethod
    def _some_and_each_once(cls, values: tuple, info: ValidationInfo) -> tuple:
        if not values:
            raise ValueError("name at least one, with commas between them")
        if twice := [value for number, value in enumerate(values) if value in values[:number]]:
            raise ValueError(f"{written(twice[:1])} stands there twice: every value once")
        return values

    @field_validator("models")
    @classmethod
    def _models_known(cls, values: tuple) -> tuple:
        for name in values:
            _said(models.locate, name)
        return values

    @field_validator("tasks", "methods", "modes")
    @classmethod
    def _names_known(cls, values: tuple, info: ValidationInfo) -> tuple:
        known = {"tasks": tasks_with_answers(), "methods": METHODS, "modes": MODES}[info.field_name]
        for name in values:
            if name not in known:
                raise ValueError(unknown(info.field_name[:-1], name, known))
        return values

    @field_validator("sparsities")
    @classmethod
    def _shares(cls, values: tuple, info: ValidationInfo) -> tuple:
        in_groups = "nm" in info.data.get("methods", ())
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"a sparsity must be in [0, 1], got {value:g}")
            if in_groups and (masks.exact(value) * mask_sets.GROUP).denominator != 1:
                raise ValueError(
                    f"method nm takes a whole number of each {mask_sets.GROUP} weights: sparsities must be multiples "
                    f"of {1 / mask_sets.GROUP:g}, got {value:g}"
                )
        return values

    @field_validator("seeds")
    @classmethod
    def _seeds_count(cls, values: tuple) -> tuple:
        for value in values:
            if not 0 <= value < 2**32:
                raise ValueError(f"a seed must be in [0, 2**32), got {value}")
        return values


class _Sweep(_Lists):
    """The same with what the jobs share, and the plan of both."""

    folder: str = Field(NAME, min_length=1, description="where its runs lie; what is done there is not done again")

    @field_validator("data", "train_data", check_fields=False)
    @classmethod
    def _rows_are_here(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value != tasks.BUNDLED:
            if not Path(value).expanduser().is_file():
                raise ValueError(f"{value!r} is no file here: name one, or bundled")
            if len(info.data.get("tasks", ())) > 1:
                raise ValueError(f"{value!r} holds the rows of one task: leave one task, or take bundled rows")
        return value

    def plan(self) -> dict[str, Any]:
        """The plan as `nbhelpers sweep` reads it: what is at its default or has one value is not spelled out."""
        axes: dict[str, Any] = {}
        base: dict[str, Any] = {}
        for name, field in SINGLE.items():
            values = list(getattr(self, name))
            if len(values) > 1:
                axes[field] = values
            elif name != "seeds" or values[0] != SparsityConfig.model_fields["seed"].default:
                base[field] = values[0]
        seeds = axes.pop("seed", None)
        axes["method"] = {name: dict(METHODS[name]) for name in self.methods}
        axes["sparsity"] = list(self.sparsities)
        axes["mode"] = list(self.modes)
        always = ("steps", "data")
        for name in SHARED:
            if name in always or getattr(self, name) != SparsityConfig.model_fields[name].default:
                base[name] = getattr(self, name)
        called = f"sparsity of {written(self.models)}"
        whole = {"kind": KIND, "name": called, "base": base, "axes": axes}
        whole |= {} if seeds is None else {"seeds": seeds}
        return whole | {"aliases": ALIASES}


def _of_a_job(name: str) -> tuple[Any, Any]:
    """A field as a job has it. A learning rate is written, not slid: what counts is its order of magnitude."""
    info = SparsityConfig.model_fields[name]
    return (int | float if name == "learning_rate" else info.annotation, info)


SweepConfig = create_model(
    "SweepConfig",
    __base__=_Sweep,
    __doc__="Everything that a sweep is made of. Refuses what makes no sense, field by field.",
    **{name: _of_a_job(name) for name in SHARED},
)


def _said(call: Callable, *arguments: Any) -> Any:
    """A LookupError is said as pydantic hears it."""
    try:
        return call(*arguments)
    except LookupError as error:
        raise ValueError(str(error)) from error


def texts(config: _Sweep) -> dict[str, Any]:
    """The values of a config as a form shows them and a notebook's parameters say them."""
    values = config.model_dump()
    return {name: written(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_plan(plan: Mapping[str, Any], folder: str) -> _Sweep | None:
    """The config that makes the rows and jobs of this plan; None where a form cannot say them."""
    base, axes = dict(plan.get("base", {})), dict(plan.get("axes", {}))
    method = axes.get("method")
    values: dict[str, Any] = {name: base.pop(name) for name in SHARED if name in base}
    for name, field in SINGLE.items():
        found = axes.get(field, [base[field]] if field in base else None)
        found = plan["seeds"] if name == "seeds" and plan.get("seeds") else found
        values |= {} if found is None else {name: found}
    try:
        config = SweepConfig(
            methods=list(method), sparsities=axes["sparsity"], modes=axes["mode"], folder=folder, **values
        )
        ours, theirs = (grid.expand(grid.read_plan(one)) for one in (config.plan(), plan))
    except (ValidationError, ValueError, LookupError, TypeError):
        return None
    same = ours.jobs.keys() == theirs.jobs.keys() and len(ours.rows) == len(theirs.rows)
    return config if same else None


def write_plan(config: _Sweep, folder: Path) -> Path:
    """The plan as a file in its folder, to be carried elsewhere."""
    lines = f"#   nbhelpers sweep plan {PLAN}\n#   nbhelpers sweep run {PLAN} --out {folder.name} --workers 2\n"
    text = yaml.safe_dump(plain(config.plan()), sort_keys=False, default_flow_style=None, width=110)
    write_atomic(folder / PLAN, lines + text)
    return folder / PLAN


# --- folders --------------------------------------------------------------------------------------------------------


def sweeps(root: Path) -> list[Ledger]:
    """The sparsity sweeps in a folder, the newest first. What cannot be read is none."""
    found = []
    for path in root.glob("*/plan.json") if root.is_dir() else ():
        try:
            ledger = Ledger(path.parent)
        except (ValueError, OSError, TypeError, KeyError):
            continue
        if ledger.plan.get("kind") == KIND:
            found.append((path.stat().st_mtime, ledger))
    return [ledger for _, ledger in sorted(found, key=lambda one: one[0], reverse=True)]


def unfinished(plan: Mapping[str, Any], root: Path) -> str | None:
    """The folder of a sweep that was begun here with jobs of this plan alone and is not at its end."""
    jobs = set(grid.expand(grid.read_plan(plan)).jobs)
    for ledger in sweeps(root):
        held = set(ledger.jobs) | set(ledger.no_longer_planned)
        if held <= jobs and done(ledger, jobs) < len(jobs):
            return ledger.folder.name
    return None


def done(ledger: Ledger, jobs: Any) -> int:
    """How many of these jobs are finished in a folder, whatever its plan is now."""
    known = ledger.jobs.keys() | ledger.no_longer_planned.keys()
    return sum(ledger.state(job).status == "finished" for job in set(jobs) & known)


def new_name() -> str:
    """A folder that is not there yet."""
    return f"{NAME}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}-{token_hex(3)}"


# --- the same sweep elsewhere ----------------------------------------------------------------------------------------


def commands(folder: str) -> dict[str, str]:
    """The sweep carried on elsewhere: by command, by several processes, on a cluster."""
    plan, probe = shlex.quote(f"{folder}/{PLAN}"), shlex.quote(f"{folder}/{workers.FOLDER}/{workers.PLAN}")
    folder = shlex.quote(folder)
    return {
        "one process": f"nbhelpers sweep run {plan} --out {folder}",
        "two processes of this machine": f"nbhelpers sweep run {plan} --out {folder} --workers 2",
        "Ray, on this machine or a cluster": f"nbhelpers sweep run {plan} --out {folder} --engine ray",
        "machines that share the folder": f"nbhelpers sweep worker {probe} --folder {folder}",
        "Slurm": f"sbatch --export=ALL,SHARED={folder} plans/slurm.sh",
        "where it stands, and the report": f"nbhelpers sweep status {folder}\nnbhelpers sweep report {folder}",
    }


def papermill_line(config: _Sweep, notebook: str, own: Sequence[str]) -> str:
    """The notebook with this form in its parameters; other fields that are not at their default travel in `more`."""
    values = texts(config)
    rest = {name: value for name, value in equivalents.changed(config).items() if name not in own}
    words = [
        "papermill",
        f"{notebook}.ipynb",
        f"{notebook}-done.ipynb",
        "-k",
        "python3",
    ]
    words += [word for name in own if values[name] is not None for word in ("-p", name, str(values[name]))]
    none = [f"{name}: null" for name in own if values[name] is None]
    extra = [*none, *([f"more: {json.dumps(rest)}"] if rest else [])]
    return shlex.join([*words, *(["-y", "\n".join(extra)] if extra else [])])
