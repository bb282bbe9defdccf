"""What does Colab offer a notebook, and what does it lack? Downloads, Drive, secrets, packages.

The one module that imports `google.colab`, and only inside functions. Elsewhere everything here is a plain no.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from nbhelpers import runtime
from nbhelpers.errors import flat

# What Colab's image lacks or may lack, and what each is for; a floor, never an exact version. `requirements-colab.txt`
# holds the same lines for people who install by hand (a test compares them).
OPTIONAL = {
    "bitsandbytes>=0.48": "models in 8 or 4 bits",
    "papermill>=2.6": "running notebooks without a person",
    "typer>=0.20": "the command line",
}
# A running session holds these open, or computes with them: replacing one asks the user for a restart.
PROTECTED = (
    *("torch", "torchvision", "torchaudio", "numpy", "scipy", "pandas", "pyarrow", "pillow", "matplotlib"),
    *("ipywidgets", "widgetsnbextension", "ipython", "ipykernel", "tornado", "traitlets", "jupyter-client", "pyzmq"),
    *("transformers", "tokenizers", "safetensors", "huggingface-hub", "peft", "accelerate", "datasets"),
    *("scikit-learn", "pydantic", "pydantic-core", "jinja2", "psutil", "protobuf", "requests"),
)
INSTALL_SECONDS = 300
LARGE_DOWNLOAD = 100 * 10**6  # bytes: from here on the browser takes long, and a Drive folder is safer
DRIVE = Path("/content/drive")
log = logging.getLogger(__name__)


def is_colab() -> bool:
    """Whether a person looks at this in Colab (told by the shell; a headless run inside Colab is none)."""
    return runtime.where() == "colab"


# --- files out --------------------------------------------------------------------------------------------------------


def download(path: str | os.PathLike) -> str:
    """Send one file through the browser; returns a line that says so, and warns above 100 MB.

    ValueError for what is no file (zip a folder first), RuntimeError outside Colab.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"only a file can be downloaded, got {str(path)!r}: zip a folder first")
    if not is_colab():
        raise RuntimeError(f"this is not Colab, there is nothing to download from: the file is {str(path)!r}")
    from google.colab import files

    files.download(str(path))
    size = path.stat().st_size
    line = f"downloading {path.name} ({size / 1e6:.1f} MB)"
    return line if size <= LARGE_DOWNLOAD else f"{line}: that is much for a browser; a Drive folder is safer"


def drive_folder() -> Path | None:
    """Where results go in Drive, `MyDrive/nbhelpers`; None where no Drive is mounted. Never asks for one."""
    mine = DRIVE / "MyDrive"
    return mine / "nbhelpers" if os.path.isdir(mine) else None  # os.path: a mount that died is a no, not an error


def mount_drive(tell: Callable[[str], object] = log.warning) -> Path | None:
    """Let Colab ask for Drive, and make our folder there. None after a refusal, which `tell` gets in one line."""
    if drive_folder() is None:
        if not is_colab():
            tell("Drive can be mounted in Colab only: results stay on this machine")
            return None
        from google.colab import drive

        try:
            drive.mount(str(DRIVE))
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - Colab raises several kinds for a refusal
            tell(f"Drive was not mounted ({flat(error)}): results stay on this machine and go with it")
            return None
    folder = drive_folder()
    if folder is None:
        tell(f"Drive was mounted but has no {DRIVE / 'MyDrive'}: results stay on this machine and go with it")
        return None
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        tell(f"cannot write to Drive ({flat(error)}): results stay on this machine and go with it")
        return None
    return folder


# --- secrets ----------------------------------------------------------------------------------------------------------


def secret(name: str = "HF_TOKEN") -> str | None:
    """A token: of the environment, else of Colab's secrets, else None. It is returned, never shown or logged."""
    value = os.environ.get(name, "").strip()
    if value or not is_colab():
        return value or None
    from google.colab import userdata

    kinds = ("SecretNotFoundError", "NotebookAccessError", "TimeoutException")  # older Colabs lack the last
    refusals = tuple(getattr(userdata, kind) for kind in kinds if hasattr(userdata, kind))
    try:
        return (userdata.get(name) or "").strip() or None
    except refusals as error:
        log.info("no %s from Colab's secrets (%s)", name, type(error).__name__)
        return None


# --- packages ---------------------------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """The lines of OPTIONAL that nothing installed here satisfies; nothing is imported."""
    importlib.invalidate_caches()
    missing = []
    for line in OPTIONAL:
        name, floor = line.split(">=")
        installed = _version(name)
        if installed is None or _numbers(installed) < _numbers(floor):
            missing.append(line)
    return missing


def install_missing() -> str:
    """In Colab, install what is missing without moving what is there; one sentence about it, "" where there is nothing.

    The installed versions of the PROTECTED packages are constraints of the installation and are read again after it.
    What cannot be installed is optional: the sentence says what does not work without it, and nothing is raised.
    """
    missing = missing_packages() if is_colab() else []
    if not missing:
        return ""
    before = {name: version for name in PROTECTED if (version := _version(name))}
    problem = _install(missing, before)
    importlib.invalidate_caches()
    moved = {name: (old, _version(name)) for name, old in before.items() if _version(name) != old}
    if moved:
        said = ", ".join(f"{name} {old} became {new or 'nothing'}" for name, (old, new) in moved.items())
        return f"pip replaced what this session already uses ({said}): restart the session, then run again"
    still = missing_packages()
    if still:
        without = ", ".join(f"{line.split('>=')[0]} ({OPTIONAL[line]})" for line in still)
        return f"could not install {without}: {problem or 'pip said nothing'}. Everything else works"
    return "installed " + ", ".join(f"{name} {_version(name)}" for name in (line.split(">=")[0] for line in missing))


def _install(lines: list[str], held: dict[str, str]) -> str | None:
    """Run pip; None or, in a few words, what went wrong."""
    with tempfile.TemporaryDirectory(prefix="nbhelpers-") as scratch:
        constraints = Path(scratch) / "held.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()), encoding="utf-8")
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        command = [sys.executable, "-m", "pip", "install", *options, "--constraint", str(constraints), *lines]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return flat(error)
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return said[0].removeprefix("ERROR: ")[:200].rstrip(".") if said else f"pip ended with {done.returncode}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, to compare with a floor: "2.11.0+cu128" is (2, 11, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
