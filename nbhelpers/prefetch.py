"""How do the models and data of a plan get to nodes without a network? Fetched and hashed beforehand, checked there.

`fetch(plan)` brings every model and data set that a plan names into the caches of the hub's libraries (HF_HOME), reads
every row as a job will, and returns what came: the revision, and the sha256 of each file and of the rows. On a node the
same call with the record of it, and HF_HUB_OFFLINE=1, finds whether the same things are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nbhelpers import adapters, grid, jobkinds, mask_choice, models, records
from nbhelpers.grid import Plan

FORMAT = 1
KINDS = jobkinds.KINDS  # of jobs that a plan may name
MODEL_FIELDS, MASKS = ("model", "control", "adapter"), "masks"
DATA_FIELDS = ("text", "task", "data", "train_data", "shots_data", "shots", "limit")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OTHERS = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", "vocab*", "merges*")  # config and tokenizer; no code


def fetch(
    plan: str | Path | Mapping[str, Any] | Plan, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """{"format", "models": {name: {source, revision, bytes, files}}, "data": {what: sha256}} of all that a plan reads.

    ValueError for what cannot be fetched, naming it. A search's fixed values name its models and data.
    """
    expansion = grid.expand(grid.read_plan(plan))
    jobs = list(expansion.jobs.values())
    configs = [job.config for job in jobs] or [expansion.kind.config(**expansion.plan.base).model_dump()]
    tell = progress or (lambda now: None)
    found: dict[str, dict[str, Any]] = {"models": {}, "data": {}}
    seen = set()
    named = {config.get(field) for config in configs for field in MODEL_FIELDS}
    waiting = sorted(name for name in named if isinstance(name, str))
    for name in waiting:  # that of adapters brings the one they belong on
        tell({"stage": "fetching model", "name": name})
        found["models"][name] = _model(name)
        waiting += [base for base in _below(name) if base not in waiting]
    for place in sorted({config[MASKS] for config in configs if config.get(MASKS)}):
        found["data"][f"masks {place}"] = records.sha256_known(mask_choice.file_in(place))
    for config in configs:
        asked = tuple(config.get(field) for field in DATA_FIELDS)
        if asked not in seen:
            seen.add(asked)
            tell({"stage": "reading data", "name": " ".join(str(value) for value in asked if value is not None)})
            found["data"] |= expansion.kind.reads(expansion.kind.config(**config))
    return {"format": FORMAT, "plan": expansion.plan.name, **found}


def _model(name: str) -> dict[str, Any]:
    source, location = models.locate(name)
    revision = None
    if source == "hub":
        folder = Path(_snapshot(name, location))
        revision = folder.name
    else:
        folder = Path(location)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{name!r} holds no safetensors file, and nothing else is read: name another model")
    hashed = {path.relative_to(folder).as_posix(): records.sha256_known(path) for path in files}
    size = sum(path.stat().st_size for path in files)
    return {"source": source, "revision": revision, "bytes": size, "files": hashed}


def _below(name: str) -> list[str]:
    source, location = models.locate(name)
    below = None if source == "hub" else adapters.base_of(location)
    return [below["model"]] if below and below["model"] else []


def _snapshot(name: str, hub_id: str) -> str:
    """The folder of a model's files in the hub's cache, fetched where they are not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(hub_id, allow_patterns=[*WEIGHTS, *OTHERS])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        raise ValueError(
            f"cannot fetch model {name!r}: {reason}; run this where there is a network, with the same HF_HOME as the "
            "nodes, and for a gated model with its licence accepted and a token in HF_TOKEN"
        ) from error


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs between two records, a line each; empty where a plan reads the same in both places."""
    said = []
    for name in _both(here["models"], there["models"]):
        one, other = (record["models"].get(name, {}).get("files", {}) for record in (here, there))
        wrong = [file for file in _both(one, other) if one.get(file) != other.get(file)]
        said += [f"model {name}: {file} {_how(one.get(file), other.get(file))}" for file in wrong]
    for what in _both(here["data"], there["data"]):
        one, other = here["data"].get(what), there["data"].get(what)
        said += [f"data {what} {_how(one, other)}"] if one != other else []
    return said


def _both(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return sorted({*one, *other})


def _how(here: str | None, there: str | None) -> str:
    if here is None:
        return "is not here"
    return "is not in the record" if there is None else f"differs ({here[:12]} here, {there[:12]} in the record)"


def read(path: str | Path) -> dict[str, Any]:
    """A record that `fetch` made. ValueError for another file."""
    found = records.read_json(Path(path))
    if not isinstance(found, dict) or not {"format", "models", "data"} <= found.keys() or found["format"] != FORMAT:
        raise ValueError(f"'{path}' is no record of sweep prefetch: it needs format {FORMAT}, models and data")
    return found
