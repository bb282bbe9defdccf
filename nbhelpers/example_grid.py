"""Which runs can be looked at before there are own ones? A recorded grid of 48 pruning runs, packed and unpacked here.

`python -m nbhelpers.example_grid` records it again: it carries out plans/pruning_grid.yaml (2 bundled models x 4
strategies x 3 levels x 2 seeds, some minutes on two CPU cores; after a kill the same command goes on) and writes
assets/example_grid.zip. Of each run the record is kept (manifest, metrics, events, result), never a model; what names
the machine or its user is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers import __version__, earlier, sweep
from nbhelpers.ledger import Ledger
from nbhelpers.records import read_json, read_lines, sha256_file, sha256_text, write_atomic
from nbhelpers.report import FIXED_TIME

PACKAGE = Path(__file__).parent
ASSET = PACKAGE / "assets" / "example_grid.zip"
PLAN = PACKAGE.parent / "plans" / "pruning_grid.yaml"
WORK = Path("results/example_grid")
CARD = "example.json"  # says what the folder is, and the sha256 of every other file in it
LINES = ("metrics.jsonl", "events.jsonl")
# What says whose machine it was; versions and processor stay, because seconds mean nothing without them
_OF_THE_MACHINE = ("command", "host", "user", "pid", "process_start", "platform", "git", "where", "ram_bytes")
_OF_THE_MACHINE += ("run_dir", "model_dir", "heartbeat")
_ABSOLUTE = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:\\+|~?/)[\w.~+-]+[/\\][\w.~+/\\-]*")


def unpacked(root: str | os.PathLike, archive: str | os.PathLike = ASSET) -> Path:
    """The folder under `root` with the example runs, unpacked at the first call; named by their content.

    ValueError for an archive with an entry that would leave its folder, and for a folder whose files are not those
    that were recorded.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise ValueError(f"the example runs are not here ({archive.name} is missing): name a folder with runs in it")
    folder = Path(root) / f"example-grid-{sha256_file(archive)[:8]}"
    if not folder.exists():
        _unpack(archive, folder)
    changed = changed_files(folder)
    if changed:
        raise ValueError(
            f"'{folder}' is not as it was recorded ({', '.join(changed[:3])}): delete this folder, it is unpacked again"
        )
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as bundle:
            for entry in earlier.checked_entries(bundle, folder.parent):
                place = beside / entry.filename
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(bundle.read(entry))
        beside.chmod(0o755)  # mkdtemp's is for its owner alone
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def card(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What example.json says where `folder` is, or lies in, an unpacked example; None anywhere else."""
    place = Path(folder).resolve()
    found = next((above / CARD for above in (place, *place.parents[:2]) if (above / CARD).is_file()), None)
    return read_json(found) if found else None


def stamp(folder: str | os.PathLike) -> str:
    """The sentence that stands wherever example runs are shown; empty for a folder that is none."""
    said = card(folder)
    if said is None:
        return ""
    recorded = f"recorded {said['recorded']} with nbhelpers {said['nbhelpers']}"
    return f"example runs that come with the package, {recorded}, {said['on']}"


def changed_files(folder: str | os.PathLike) -> list[str]:
    """The files of an unpacked example that are missing or differ from what was recorded."""
    folder = Path(folder)
    files: Mapping[str, str] = read_json(folder / CARD)["files"]
    return [name for name, sha in files.items() if not (folder / name).is_file() or sha256_file(folder / name) != sha]


# --- recording it ---------------------------------------------------------------------------------------------------


def record(plan: str | os.PathLike = PLAN, work: str | os.PathLike = WORK, asset: str | os.PathLike = ASSET) -> Path:
    """Carry out the plan in `work` and pack its runs. RuntimeError where a job is not finished: nothing is packed."""
    found = sweep.run(plan, work, progress=_say)
    if found["done"] < found["planned"]:
        raise RuntimeError(
            f"{found['done']} of {found['planned']} jobs finished, {found['failed']} failed: nothing was packed; "
            f"`nbhelpers sweep status {work}` tells why, and the same command goes on"
        )
    write_atomic(asset, pack(work))
    return Path(asset)


def pack(folder: str | os.PathLike) -> bytes:
    """The records of a finished sweep as a zip, without models and without what names the machine.

    The same bytes for the same runs. ValueError where a text still holds an absolute path.
    """
    ledger = Ledger(folder)
    files = {"plan.json": _json(read_json(ledger.folder / "plan.json"))}
    files["ledger.jsonl"] = _lines(ledger.folder / "ledger.jsonl")
    ended = []
    for state in ledger.states().values():
        run = state.run_dir
        manifest = without_machine(read_json(run / "manifest.json"))
        ended += [attempt["ended"] for attempt in manifest["attempts"]]
        files[f"runs/{run.name}/manifest.json"] = _json(manifest)
        files[f"runs/{run.name}/result.json"] = _json(without_machine(read_json(run / "result.json")))
        files |= {f"runs/{run.name}/{name}": _lines(run / name) for name in LINES if (run / name).exists()}
    for name, text in files.items():
        if found := _ABSOLUTE.search(text):
            raise ValueError(
                f"{name} holds the path {found.group()!r}: what is shipped must not name a machine's paths"
            )
    about = {
        "format": 1,
        "recorded": max(ended)[:10],
        "nbhelpers": __version__,
        "plan": ledger.plan["name"],
        "on": "bundled models on generated text",
        "by": "python -m nbhelpers.example_grid",
        "files": {name: sha256_text(text) for name, text in sorted(files.items())},
    }
    return zipped(files | {CARD: _json(about)})


def without_machine(value: Any) -> Any:
    """A JSON value without the fields that say whose machine it was.

    >>> without_machine({"host": "h", "attempts": [{"pid": 1, "attempt": 1}]})
    {'attempts': [{'attempt': 1}]}
    """
    if isinstance(value, Mapping):
        return {key: without_machine(inner) for key, inner in value.items() if key not in _OF_THE_MACHINE}
    return [without_machine(inner) for inner in value] if isinstance(value, list) else value


def zipped(files: Mapping[str, bytes | str]) -> bytes:
    """Files as a zip: the same bytes for the same files, whenever and wherever."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bundle:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            bundle.writestr(entry, content, compresslevel=9)
    return buffer.getvalue()


def _json(value: Any) -> str:
    """One compact line, its keys in the order of the record: tables show settings in that order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _lines(path: Path) -> str:
    return "".join(_json(without_machine(line)) for line in read_lines(path)[0])


def _say(now: Mapping[str, Any]) -> None:
    if now["stage"] == "job ended":
        sys.stderr.write(f"{now['done']}/{now['total']} {now['name']}: {now['status']}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: where the plan is, where its runs go, where the archive goes."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.example_grid", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=PLAN, help="plan to carry out (default: plans/pruning_grid.yaml)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder of the runs (default: {WORK})")
    parser.add_argument("--out", type=Path, default=ASSET, help="archive to write (default: the one in the package)")
    given = parser.parse_args(arguments)
    try:
        path = record(given.plan, given.work, given.out)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stderr.write(f"{path} ({path.stat().st_size} bytes)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
