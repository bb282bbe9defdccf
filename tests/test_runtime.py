"""Every place, device and state that the runtime tells apart, with fakes for what is not here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from nbhelpers import runtime

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# Where we run ---------------------------------------------------------------------------------------------------------


class ZMQInteractiveShell:
    """Stands for ipykernel's shell."""

    def __init__(self, **names):
        self.user_ns = names


class TerminalInteractiveShell:
    """Stands for IPython in a terminal."""


ColabShell = type("Shell", (ZMQInteractiveShell,), {"__module__": "google.colab._shell"})


@pytest.fixture
def place(monkeypatch):
    """Pretend to run in a shell with certain environment variables and no others that matter."""

    def pretend(shell=None, **variables):
        for name in [*os.environ]:
            if name.startswith(("KAGGLE_", "COLAB_", "VSCODE_")) or name == runtime.HEADLESS_VARIABLE:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))

    return pretend


@pytest.mark.parametrize(
    "shell, variables, where, interactive",
    [
        (None, {}, "script", False),
        (TerminalInteractiveShell(), {}, "script", False),
        (ZMQInteractiveShell(), {}, "jupyter", True),
        (ZMQInteractiveShell(__vsc_ipynb_file__="a.ipynb"), {}, "vscode", True),
        (ZMQInteractiveShell(), {"VSCODE_PID": "7"}, "vscode", True),
        (ColabShell(), {}, "colab", True),
        (ColabShell(), {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "colab", True),
        (ZMQInteractiveShell(), {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_GPU": "1"}, "kaggle", True),
        (ZMQInteractiveShell(), {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "kaggle", False),
        (None, {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "script", False),
        (ZMQInteractiveShell(), {"NBHELPERS_HEADLESS": "1"}, "papermill", False),
        (ColabShell(), {"NBHELPERS_HEADLESS": "1"}, "papermill", False),
        (ZMQInteractiveShell(), {"NBHELPERS_HEADLESS": "0", "COLAB_GPU": "1"}, "jupyter", True),
    ],
)
def test_each_place_is_told_from_the_others(place, shell, variables, where, interactive):
    place(shell, **variables)
    assert (runtime.where(), runtime.interactive()) == (where, interactive)


def test_a_process_that_never_imported_ipython_is_a_script(place, monkeypatch):
    place()
    monkeypatch.delitem(sys.modules, "IPython")
    assert runtime.where() == "script"


# Device and number format ---------------------------------------------------------------------------------------------


def fake_torch(*, capability=None, hip=None, mps=False, initialized=False):
    """A torch with a GPU of some compute capability (None: no GPU); the rule for bf16 is the one of torch."""

    def is_bf16_supported(including_emulation=True):
        return bool(hip) or capability >= 8 or including_emulation

    return types.SimpleNamespace(
        float32="float32",
        float16="float16",
        bfloat16="bfloat16",
        cuda=types.SimpleNamespace(
            is_available=lambda: capability is not None,
            is_initialized=lambda: initialized,
            is_bf16_supported=is_bf16_supported,
            device=lambda device: contextlib.nullcontext(),
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_device_properties=lambda index: types.SimpleNamespace(name="Fake T4", total_memory=15 * 10**9),
        ),
        backends=types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: mps)),
        mps=types.SimpleNamespace(recommended_max_memory=lambda: 12 * 10**9),
        get_num_threads=lambda: 2,
    )


@pytest.fixture
def torch_is(monkeypatch):
    def pretend(**options):
        fake = fake_torch(**options)
        monkeypatch.setitem(sys.modules, "torch", fake)
        return fake

    return pretend


@pytest.mark.parametrize(
    "machine, device, dtype",
    [
        ({"capability": 7}, "cuda", "float16"),  # T4: torch would emulate bf16, we do not want that
        ({"capability": 8}, "cuda", "bfloat16"),
        ({"capability": 9, "mps": True}, "cuda", "bfloat16"),
        ({"capability": 0, "hip": "6.2"}, "cuda", "bfloat16"),
        ({"mps": True}, "mps", "float32"),
        ({}, "cpu", "float32"),
    ],
)
def test_device_and_number_format_of_each_machine(torch_is, machine, device, dtype):
    torch_is(**machine)
    assert runtime.device() == device
    assert runtime.dtype_for(device) == dtype
    assert runtime.bf16_ok(device) == (dtype == "bfloat16")


@pytest.mark.parametrize("shell", [None, ColabShell(), ZMQInteractiveShell()])
def test_a_gpu_is_found_everywhere(torch_is, place, shell):
    place(shell)
    torch_is(capability=8)
    assert runtime.device() == "cuda"


def test_the_second_gpu_is_asked_for_its_own_format(torch_is):
    fake = torch_is(capability=8)
    asked = []
    fake.cuda.device = lambda device: asked.append(device) or contextlib.nullcontext()
    assert runtime.dtype_for("cuda:1") == "bfloat16"
    assert asked == ["cuda:1"]


def test_bf16_is_not_there_without_a_gpu_and_unknown_devices_are_refused():
    assert runtime.bf16_ok("cpu") is False
    assert runtime.dtype_for("cpu") is torch.float32
    with pytest.raises(ValueError, match="device must be cuda, cuda:N, mps or cpu, got 'xla'"):
        runtime.dtype_for("xla")


def test_a_tpu_is_refused_by_name_and_a_gpu_beside_torch_xla_is_not(torch_is, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    torch_is()
    for ask in (runtime.check_supported, runtime.device):
        with pytest.raises(RuntimeError, match="not supported: full fine-tuning untested on TPU"):
            ask()
    torch_is(capability=8)
    runtime.check_supported()
    assert runtime.device() == "cuda"


def test_without_torch_xla_everything_is_supported(torch_is):
    torch_is()
    runtime.check_supported()


# CUDA's allocator -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_machine(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that the value is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(runtime, "_expandable_segments_help", lambda: True)
    return monkeypatch


def test_expandable_segments_are_set_before_torch_is_there_and_before_it_starts_cuda(gpu_machine):
    gpu_machine.delitem(sys.modules, "torch")
    assert runtime.prepare_cuda_allocator() is True
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    gpu_machine.delenv("PYTORCH_ALLOC_CONF")
    gpu_machine.setitem(sys.modules, "torch", fake_torch(capability=8))
    assert runtime.prepare_cuda_allocator() is True


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_set_for_the_allocator_stays(gpu_machine, variable):
    gpu_machine.setenv(variable, "max_split_size_mb:64")
    assert runtime.prepare_cuda_allocator() is False
    assert os.environ[variable] == "max_split_size_mb:64"
    assert "expandable" not in os.environ.get("PYTORCH_ALLOC_CONF", "")


def test_too_late_for_the_allocator_is_said(gpu_machine, caplog):
    gpu_machine.setitem(sys.modules, "torch", fake_torch(capability=8, initialized=True))
    with caplog.at_level(logging.WARNING):
        assert runtime.prepare_cuda_allocator() is False
    assert "CUDA is already initialised" in caplog.text
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(
    "system, release, files, helps",
    [
        ("Linux", "6.1", {"/proc/driver/nvidia"}, True),
        ("Linux", "6.1", set(), False),
        ("Linux", "5.15.90.1-microsoft-standard-WSL2", {"/proc/driver/nvidia"}, False),
        ("Linux", "5.15-tegra", {"/proc/driver/nvidia", "/etc/nv_tegra_release"}, False),
        ("Windows", "11", {"/proc/driver/nvidia"}, False),
        ("Darwin", "24", {"/proc/driver/nvidia"}, False),
    ],
)
def test_the_allocator_is_touched_only_where_that_helps(monkeypatch, system, release, files, helps):
    monkeypatch.setattr(runtime.platform, "system", lambda: system)
    monkeypatch.setattr(runtime.platform, "release", lambda: release)
    monkeypatch.setattr(runtime.Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(runtime.Path, "glob", lambda path, pattern: iter(()))
    assert runtime._expandable_segments_help() is helps


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("imports", ["", "import torch; "])
def test_cuda_really_allocates_in_expandable_segments(imports):
    code = imports + (
        "from nbhelpers import runtime; did = runtime.prepare_cuda_allocator(); import torch; "
        "x = torch.ones(10, device='cuda'); "
        "print(did, all(s['is_expandable'] for s in torch.cuda.memory_snapshot()))"
    )
    env = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.gpu
@needs_cuda
def test_the_real_gpu_gets_a_format_it_computes_in_hardware():
    expected = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    assert runtime.device() == "cuda"
    assert runtime.dtype_for("cuda") is expected
    assert runtime.environment()["device"]["name"] == torch.cuda.get_device_name()


# Seeds ----------------------------------------------------------------------------------------------------------------


def draws():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def test_a_seed_repeats_all_three_generators_and_another_seed_does_not():
    with runtime.seeded(0):
        runtime.set_seed(7)
        first = draws()
        runtime.set_seed(7)
        assert draws() == first
        runtime.set_seed(8)
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_seeded_block_leaves_the_generators_as_they_were_also_after_an_error():
    with runtime.seeded(1):
        expected = draws()
    with runtime.seeded(1):
        with contextlib.suppress(ZeroDivisionError), runtime.seeded(2):
            assert draws() != expected
            _ = 1 / 0
        assert draws() == expected


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", True, None])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*32\), got "):
        runtime.set_seed(seed)


# The record -----------------------------------------------------------------------------------------------------------


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_environment_is_recorded_without_importing_torch():
    code = (
        "import json, sys; from nbhelpers import runtime; e = runtime.environment(); "
        "e['torch'] = 'torch' in sys.modules; print(json.dumps(e, allow_nan=False))"
    )
    record = json.loads(in_fresh_process(code))
    assert record["torch"] is False
    assert record["device"] == {"type": "unknown", "name": "unknown", "total_bytes": None}
    assert record["where"] == "script"
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["cpu"]["name"]
    assert record["cpu"]["logical_cores"] == os.cpu_count() and record["cpu"]["threads"] is None
    assert record["cpu"]["ram_bytes"] > 10**8
    assert {"host", "platform", "libs", "git"} <= record.keys()


def test_the_threads_that_compute_are_recorded_as_sums_depend_on_them(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert runtime.environment()["cpu"]["threads"] == 7


def test_probing_imports_torch_and_names_the_device():
    code = "from nbhelpers import runtime; print(runtime.environment(probe=True)['device']['type'])"
    assert in_fresh_process(code).strip() in {"cuda", "mps", "cpu"}


@pytest.mark.parametrize(
    "machine, device",
    [
        ({"capability": 7}, {"type": "cuda", "name": "Fake T4", "total_bytes": 15 * 10**9, "count": 1}),
        ({"mps": True}, {"type": "mps", "name": "Apple GPU", "total_bytes": 12 * 10**9}),
    ],
)
def test_the_record_names_the_device_and_its_memory(torch_is, machine, device):
    torch_is(**machine)
    assert runtime.environment()["device"] == device


def test_the_record_of_a_tpu_is_written_although_it_is_not_supported(torch_is, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    torch_is()
    assert runtime.environment()["device"]["type"] == "tpu"


def test_library_versions_are_those_installed_and_leave_out_what_is_not(monkeypatch):
    import transformers

    versions = runtime.library_versions()
    assert versions["transformers"] == transformers.__version__
    assert versions["nbhelpers"]
    monkeypatch.setattr(runtime, "LIBRARIES", ["numpy", "no-such-library"])
    assert runtime.library_versions().keys() == {"numpy", "nbhelpers"}


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "kept.txt").write_text("one")
    git(tmp_path, "add", "kept.txt")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


def test_git_state_is_the_commit_and_whether_tracked_files_changed(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "untracked.txt").write_text("new")
    assert runtime.git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "kept.txt").write_text("two")
    assert runtime.git_state(repository) == {"commit": commit, "dirty": True}
    assert runtime.git_state(repository / "kept.txt") == {"commit": commit, "dirty": True}


def test_a_package_installed_into_somebodys_project_is_not_that_project(repository):
    (repository / "installed.py").write_text("")
    assert runtime.git_state(repository / "installed.py") is None


def test_git_state_is_none_outside_a_repository_before_a_commit_without_git_and_when_git_is_slow(tmp_path, monkeypatch):
    assert runtime.git_state(tmp_path / "not there" / "at all") is None
    assert runtime.git_state("/") is None
    git(tmp_path, "init", "--quiet")
    assert runtime.git_state(tmp_path) is None

    def slow(command, timeout, **options):
        assert timeout <= 5
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(runtime.subprocess, "run", slow)
    assert runtime.git_state(tmp_path) is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert runtime.git_state(tmp_path) is None


def test_the_cpu_has_a_name_also_where_proc_is_missing(monkeypatch):
    def missing(*arguments, **options):
        raise OSError("no /proc")

    monkeypatch.setattr(runtime.Path, "read_text", missing)
    assert runtime._cpu_name()


def test_waiting_threads_are_told_to_sleep_before_torch_is_loaded_and_never_against_the_user(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert runtime.let_threads_sleep() is False and "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delitem(sys.modules, "torch")
    assert runtime.let_threads_sleep() is True and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert runtime.let_threads_sleep() is False and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
