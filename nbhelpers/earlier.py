"""Which earlier runs are there? On this machine, in a Drive folder, and in archives that somebody uploaded."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from nbhelpers import report
from nbhelpers.errors import flat
from nbhelpers.records import slug
from nbhelpers.registry import unknown
from nbhelpers.runs import Run, read_run

MOST_BYTES = 4 * 2**30  # unpacked, of one archive
MOST_FILES = 20_000
MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 2**20
NOT_KEPT = ("lock", "*.tmp", "*.part")  # belong to the process at work, or are not whole
NEWEST = "newest"  # what `resume` may also say: the interrupted run that was begun last
UNFINISHED = ("interrupted", "failed")
log = logging.getLogger(__name__)
Tell = Callable[[str], object]


def find_runs(
    root: str | os.PathLike,
    drive: str | os.PathLike | None = None,
    uploads: str | os.PathLike | None = ".",
    tell: Tell = log.warning,
) -> list[Run]:
    """Every run in `root`, in the Drive folder, and in the archives lying in `uploads`, newest first, each once.

    Archives are unpacked into `root`; a run that is there already stays as it is. What cannot be read (a torn archive,
    one that holds no run, a broken manifest) is told in one line and left alone.
    """
    if uploads is not None and os.path.isdir(uploads):
        for archive in sorted(Path(uploads).glob("*.zip")):
            try:
                unpack(archive, root)
            except (ValueError, OSError) as error:
                tell(f"{archive.name}: {flat(error)}")
    found: dict[str, Run] = {}
    for place in filter(None, (root, drive)):
        for run in _runs_in(Path(place), tell):
            known = found.get(run.run_id)
            if known is None or (known.result is None and run.result is not None):  # the finished copy of two
                found[run.run_id] = run
    return sorted(found.values(), key=lambda run: (str(run.manifest.get("created", "")), run.run_id), reverse=True)


def find_unfinished(wanted: str, runs: Iterable[Run], what: str) -> Run:
    """The one of these interrupted runs with a name, run id or folder; "newest": the first. LookupError where there is
    none. what: of which kind they are, in words."""
    runs = list(runs)
    for run in runs:
        if wanted in (NEWEST, run.run_id) or Path(wanted).name == run.folder.name:
            return run
    if not runs:
        raise LookupError(f"resume {wanted!r}: no interrupted {what} is here; leave resume out for a new run")
    raise LookupError(unknown("interrupted run", wanted, [run.folder.name for run in runs]))


def _runs_in(folder: Path, tell: Tell) -> Iterable[Run]:
    try:
        inside = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        tell(f"{folder}: {flat(error)}")
        return
    for place in inside:
        if place.name.startswith(".") or not os.path.isfile(place / MANIFEST):
            continue
        try:
            yield read_run(place)
        except (ValueError, OSError) as error:
            tell(flat(error))


def table(runs: Iterable[Run]) -> str:
    """For people: a line a run (name, kind, model, status, folder of its saved model), its headline below."""
    rows = [("run", "kind", "model", "status", "saved model"), *map(_row, runs)]
    if len(rows) == 1:
        return "no earlier runs"
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
        lines.append("  ".join([*cells, row[4]]).rstrip())
        lines += [f"    {text}" for text in row[5:] if text]
    return "\n".join(lines)


def _row(run: Run) -> tuple[str, ...]:
    models = run.config.get("model", run.config.get("models"))
    shown = ", ".join(map(str, models)) if isinstance(models, list) else str(models or "")
    saved = run.folder / "model"
    place = os.path.relpath(saved) if (saved / "config.json").is_file() else "none"
    said = report.headline(run) if run.result and "verdict" in run.result else ""
    return run.name, run.kind, shown, run.status, place, said


# --- archives ---------------------------------------------------------------------------------------------------------


def archive_run(run_dir: str | os.PathLike) -> Path:
    """One zip of one run, in its directory; weights above 50 MB are left out and named in it."""
    run = read_run(run_dir)
    return report.archive(run.folder, f"{run.folder.resolve().name}.zip")


def unpack(archive: str | os.PathLike, root: str | os.PathLike) -> list[Path]:
    """Unpack every run that an archive holds into `root`, whole or not at all; returns the new run directories.

    A run may lie at the top of the archive or in any folder of it; a run that `root` has already is left out.
    ValueError for an archive that is torn, holds no run, is too large, or has an entry that would leave its folder (an
    absolute path, `..`, a link).
    """
    archive, root = Path(archive), Path(root)
    try:
        with zipfile.ZipFile(archive) as bundle:
            entries = checked_entries(bundle, root)
            new = []
            for prefix, name in _runs_of(bundle, entries):
                target = root / name
                if not target.exists():
                    _unpack_run(
                        bundle, [entry for entry in entries if entry.filename.startswith(prefix)], prefix, target
                    )
                    new.append(target)
            return new
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"is no whole zip archive ({flat(error)}): upload it again") from error


def checked_entries(bundle: zipfile.ZipFile, root: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive, all of which stay in their folder and fit into `root`; else a ValueError."""
    entries = [entry for entry in bundle.infolist() if not entry.is_dir()]
    for entry in entries:
        _check_entry(entry)
    _check_size(entries, root)
    return entries


def _check_entry(entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    leaves = path.is_absolute() or ".." in path.parts or "\\" in entry.orig_filename or ":" in path.parts[0]
    mode = entry.external_attr >> 16
    if leaves or "\0" in entry.orig_filename:
        raise ValueError(f"entry {entry.orig_filename!r} would leave its folder: nothing of it was unpacked")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise ValueError(f"entry {entry.filename!r} is a link or a device: nothing of it was unpacked")
    if entry.flag_bits & 1:
        raise ValueError(f"entry {entry.filename!r} is encrypted: nothing of it was unpacked")


def _check_size(entries: list[zipfile.ZipInfo], root: Path) -> None:
    size = sum(entry.file_size for entry in entries)
    standing = next(place for place in (root, *root.absolute().parents) if place.exists())
    limit = min(MOST_BYTES, shutil.disk_usage(standing).free)
    if size > limit or len(entries) > MOST_FILES:
        raise ValueError(
            f"holds {len(entries)} files of {size / 1e6:.0f} MB together, the limit is {MOST_FILES} of "
            f"{limit / 1e6:.0f} MB: nothing of it was unpacked"
        )


def _runs_of(bundle: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> list[tuple[str, str]]:
    """(prefix in the archive, name of the folder to be) of each run; one inside another is a part of it."""
    found: list[tuple[str, str]] = []
    manifests = [entry for entry in entries if PurePosixPath(entry.filename).name == MANIFEST]
    for entry in sorted(manifests, key=lambda entry: entry.filename.count("/")):
        prefix = entry.filename[: -len(MANIFEST)]
        if any(prefix.startswith(outer) for outer, _ in found) or entry.file_size > MOST_MANIFEST_BYTES:
            continue
        try:
            manifest = json.loads(bundle.read(entry))
        except ValueError:
            continue
        if isinstance(manifest, dict) and {"run_id", "kind", "config", "status"} <= manifest.keys():
            name = PurePosixPath(prefix).name if prefix else str(manifest["run_id"])
            found.append((prefix, slug(name)))
    if not found:
        raise ValueError("holds no run: an archive of this project has a manifest.json in each run's folder")
    return found


def _unpack_run(bundle: zipfile.ZipFile, entries: list[zipfile.ZipInfo], prefix: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    try:
        for entry in entries:
            place = beside / entry.filename[len(prefix) :]
            place.parent.mkdir(parents=True, exist_ok=True)
            with bundle.open(entry) as source, place.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        read_run(beside)
        beside.chmod(0o755)  # mkdtemp's is for its owner alone
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# --- a copy that outlives this machine --------------------------------------------------------------------------------


def keep(run_dir: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Mirror a run that has ended into `folder` (in Drive), whole or not at all; returns its place there.

    An earlier copy is replaced. ValueError for a run that is still at work; OSError, in one line, where the copy cannot
    be written: then nothing of it is left and an earlier copy stays.
    """
    run = read_run(run_dir)
    if run.status == "running":
        raise ValueError(f"run {run.run_id} is still running: keep it when it has ended")
    source, folder = run.folder.resolve(), Path(folder)
    place, beside, old = (
        folder / f"{lead}{source.name}{end}" for lead, end in (("", ""), (".", ".part"), (".", ".old"))
    )
    skipped = shutil.ignore_patterns(*NOT_KEPT, f"{source.name}.zip")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in (beside, old):  # of a copy that was cut off
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(source, beside, ignore=skipped)
        _check_copy(source, beside)
        if place.exists():
            place.rename(old)
        beside.rename(place)
    except (OSError, shutil.Error) as error:
        if old.exists() and not place.exists():
            old.rename(place)
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or flat(error)[:200]
        raise OSError(
            f"run {run.run_id} could not be kept in {str(folder)!r} ({reason}): it is in {str(source)!r}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return place


def _check_copy(source: Path, copy: Path) -> None:
    for path in copy.rglob("*"):
        if path.is_file() and path.stat().st_size != (source / path.relative_to(copy)).stat().st_size:
            raise OSError(f"{path.name} was not copied whole")
