"""Where do we run, on which device, with which versions: and the one place that seeds global generators."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Where = Literal["colab", "kaggle", "vscode", "jupyter", "papermill", "script"]

HEADLESS_VARIABLE = "NBHELPERS_HEADLESS"
LIBRARIES = (
    "nbhelpers",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pydantic",
    "matplotlib",
    "ipywidgets",
    "ipykernel",
    "papermill",
    "psutil",
)

log = logging.getLogger(__name__)


# Where we run ---------------------------------------------------------------------------------------------------------


def where() -> Where:
    """What executes this code.

    `papermill` is any headless notebook run: the runner sets NBHELPERS_HEADLESS=1, and a process inside Colab that has
    no front end is one too, so the variable is asked first. Colab is told by the type of its shell, since Kaggle sets
    Colab's environment variables; an IPython terminal has no notebook around it and counts as a script.
    """
    if os.environ.get(HEADLESS_VARIABLE) == "1":
        return "papermill"
    shell = _shell()
    if "google.colab" in str(type(shell)):
        return "colab"
    if "ZMQ" not in type(shell).__name__:
        return "script"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    if "__vsc_ipynb_file__" in getattr(shell, "user_ns", {}) or "VSCODE_PID" in os.environ:
        return "vscode"
    return "jupyter"


def interactive() -> bool:
    """Whether somebody may be looking: a notebook with a front end. Kaggle's batch runs and papermill have none."""
    batch = os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"
    return where() in ("colab", "kaggle", "vscode", "jupyter") and not (where() == "kaggle" and batch)


def _shell() -> Any:
    """IPython's shell of this process, or None. A process that never imported IPython has none."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


# Device and number format ---------------------------------------------------------------------------------------------


def device() -> str:
    """`cuda`, `mps` or `cpu`, the first that is there, wherever we run. A TPU raises (see `check_supported`)."""
    import torch

    check_supported()
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_supported() -> None:
    """Refuse a TPU runtime before anything is downloaded: RuntimeError where torch_xla is there and no CUDA device."""
    if not _torch_xla_installed():
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            "not supported: full fine-tuning untested on TPU (torch_xla is installed, no CUDA device found); "
            "choose a GPU or CPU runtime, or uninstall torch_xla"
        )


def _torch_xla_installed() -> bool:
    return "torch_xla" in sys.modules or importlib.util.find_spec("torch_xla") is not None


def bf16_ok(device: str) -> bool:
    """Whether the device computes bfloat16 in hardware: CUDA from compute capability 8 on, ROCm. A T4 only emulates."""
    import torch

    if _kind(device) != "cuda" or not torch.cuda.is_available():
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def dtype_for(device: str) -> torch.dtype:
    """The number format in which weights are loaded for inference on `device`.

    CUDA: bfloat16 where the hardware has it, else float16 (a T4). CPU and MPS: float32, because most CPUs have no
    16-bit matrix units and are slower and less exact in it, and bfloat16 on MPS depends on chip and macOS version.
    Training keeps float32 masters of whatever it trains, whatever this says.
    """
    import torch

    if _kind(device) != "cuda":
        return torch.float32
    return torch.bfloat16 if bf16_ok(device) else torch.float16


def _kind(device: str) -> str:
    kind = str(device).split(":")[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device must be cuda, cuda:N, mps or cpu, got {str(device)!r}")
    return kind


def prepare_cuda_allocator() -> bool:
    """Let CUDA's allocator grow its segments (less fragmentation, fewer out-of-memory errors); says whether it did.

    Sets PYTORCH_ALLOC_CONF=expandable_segments:True, which counts only before torch starts CUDA: call it first. Left
    alone: a value the user set (also the older PYTORCH_CUDA_ALLOC_CONF), machines without an NVIDIA device, and
    platforms where torch does not support it or it does harm (Windows and WSL, macOS, Tegra boards).
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        return False
    if not _expandable_segments_help():
        return False
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        log.warning("expandable segments not set: CUDA is already initialised; restart the kernel and set up first")
        return False
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return True


def _expandable_segments_help() -> bool:
    if platform.system() != "Linux" or "microsoft" in platform.release().lower():
        return False
    tegra = Path("/etc/nv_tegra_release").exists()
    return not tegra and (Path("/proc/driver/nvidia").exists() or any(Path("/dev").glob("nvidia[0-9]*")))


# Seeds ----------------------------------------------------------------------------------------------------------------


def let_threads_sleep() -> bool:
    """OpenMP threads that wait should sleep, not spin: on a busy machine that makes small models many times faster.

    Sets OMP_WAIT_POLICY=PASSIVE unless it is set or torch is loaded (which reads it once); returns whether it did.
    """
    if "OMP_WAIT_POLICY" in os.environ or "torch" in sys.modules:
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True


def quiet_libraries() -> None:
    """No progress bars and advice of other libraries between our own lines; what they warn of is in a run's log.txt."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice on a CPU kernel at every import of peft


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (every device). `seed`: integer in [0, 2**32)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """`set_seed` for a block: afterwards, also after an error, every generator goes on as if the block had not been."""
    import numpy as np
    import torch

    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    mps = torch.backends.mps.is_available()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_before = torch.cuda.get_rng_state_all() if cuda else None
    mps_before = torch.mps.get_rng_state() if mps else None
    try:
        set_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if cuda_before is not None:
            torch.cuda.set_rng_state_all(cuda_before)
        if mps_before is not None:
            torch.mps.set_rng_state(mps_before)


# What goes into the record --------------------------------------------------------------------------------------------


def environment(*, probe: bool = False) -> dict[str, Any]:
    """What the numbers of a run depend on outside its config: host, platform, python, libs, cpu, device, where, git.

    Never imports torch by itself, so that a record costs nothing: `device` is {"name": "unknown"} until something else
    imported torch, unless `probe` is true. Bytes are integers; what is not known is None.
    """
    if probe:
        import torch  # noqa: F401  (the import is the point)
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libs": library_versions(),
        "cpu": _cpu(),
        "device": _device_facts(),
        "where": where(),
        "git": git_state(Path(__file__)),
    }


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that can change a number, read from metadata: nothing is imported."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "nbhelpers" not in found:
        from nbhelpers import __version__

        found["nbhelpers"] = __version__
    return found


def git_state(path: str | Path = ".") -> dict[str, Any] | None:
    """{"commit": 40 hex digits, "dirty": bool} of the repository that holds `path`; None outside one. Never raises.

    A file counts only where the repository tracks it: a package installed into somebody's project is not that project.
    Untracked files do not make a tree dirty.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_file() and _git(folder, "ls-files", "--error-unmatch", "--", path.name) is None:
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str, timeout_seconds: float = 5.0) -> str | None:
    """Output of a git command, stripped; None where git is missing, slow or says no."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def device_name(device: str) -> str:
    """A device in words: "AMD EPYC (cpu)", "NVIDIA A100 (cuda)"."""
    kind = _kind(device)
    return f"{_cpu_name() if kind == 'cpu' else _device_facts()['name']} ({kind})"


def _cpu() -> dict[str, Any]:
    """Threads: those that torch computes with, on which the last digits of sums depend; None before it is imported."""
    facts: dict[str, Any] = {"name": _cpu_name(), "logical_cores": os.cpu_count(), "cores": None, "ram_bytes": None}
    torch = sys.modules.get("torch")
    facts["threads"] = None if torch is None else torch.get_num_threads()
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        facts.update(cores=psutil.cpu_count(logical=False), ram_bytes=psutil.virtual_memory().total)
    return facts


def _cpu_name() -> str:
    """`model name` of Linux's /proc/cpuinfo, else what platform knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _device_facts() -> dict[str, Any]:
    """{"type", "name", "total_bytes"} of the device in use; type unknown while torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {"type": "unknown", "name": "unknown", "total_bytes": None}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {"type": "cuda", "name": gpu.name, "total_bytes": gpu.total_memory, "count": torch.cuda.device_count()}
    if _torch_xla_installed():
        return {"type": "tpu", "name": "TPU (not supported)", "total_bytes": None}
    if torch.backends.mps.is_available():
        return {"type": "mps", "name": "Apple GPU", "total_bytes": torch.mps.recommended_max_memory()}
    return {"type": "cpu", "name": _cpu_name(), "total_bytes": None}
