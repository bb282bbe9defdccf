"""What does a run say of itself before any work, and what may not change when it goes on?

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbhelpers.records import plain, sha256_json
from nbhelpers.redaction import Redactor
from nbhelpers.run_config import ExperimentConfig
from nbhelpers.runlock import utc_now
from nbhelpers.runs import FORMAT


def first_manifest(
    run_id: str,
    config: ExperimentConfig,
    environment: Mapping[str, Any] | None,
    fingerprints: Mapping[str, Any],
    command: list[str],
    redactor: Redactor,
) -> dict[str, Any]:
    """The manifest of a run that begins, without secrets; environment None: that of this process."""
    if environment is None:
        from nbhelpers.runtime import environment as found

        environment = found()
    written = redactor.value(config.to_dict())
    return {
        "format": FORMAT,
        "run_id": run_id,
        "name": written["name"],
        "kind": written["kind"],
        "config": written,
        "config_sha256": sha256_json(written),
        "status": "running",
        "attempts": [],
        "environment": redactor.value(plain(environment)),
        "fingerprints": dict(fingerprints),
        "command": command,
        "created": utc_now(),
    }


def refuse_strangers(run_dir: Path) -> None:
    """ValueError where files lie that no start of ours leaves: the folder is somebody else's."""
    strange = {path.name for path in run_dir.iterdir()} - {"lock", "heartbeat.json", "log.txt"}
    if strange:
        raise ValueError(
            f"'{run_dir}' holds {sorted(strange)[0]!r} but no manifest.json, so it is no run to resume: "
            "choose another folder"
        )


def refuse_changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any], run_dir: Path) -> None:
    """ValueError with what differs, unless `old` and `new` are the same."""
    if sha256_json(old) == sha256_json(new):
        return
    absent = "absent"
    pairs = {key: (old.get(key, absent), new.get(key, absent)) for key in [*old, *(k for k in new if k not in old)]}
    said = ", ".join(f"{key} was {a!r}, is {b!r}" for key, (a, b) in pairs.items() if _differ(a, b))
    raise ValueError(
        f"the {what} of run directory '{run_dir}' cannot change on resume ({said}): "
        "resume with the same one or choose another folder"
    )


def _differ(a: Any, b: Any) -> bool:
    return sha256_json(a) != sha256_json(b)
