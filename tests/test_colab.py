"""Does everything that Colab offers work there, and say no elsewhere? A fake `google.colab` stands in for it."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from test_packaging import lines_of
from test_repository import NOTEBOOKS, SOURCES, importers
from test_runtime import ColabShell, ZMQInteractiveShell

from nbhelpers import colab, runtime

TOKEN = "hf_canary_of_the_tests"


class SecretNotFoundError(Exception): ...


class NotebookAccessError(Exception): ...


class TimeoutException(Exception): ...


class MessageError(Exception): ...


class FakeColab:
    """What `google.colab` does, as far as we use it, and what it was asked for."""

    def __init__(self, drive: Path):
        self.drive, self.asked, self.refuses, self.secrets = drive, [], None, {}
        self.files = types.SimpleNamespace(download=lambda path: self.asked.append(("download", path)))
        self.userdata = types.SimpleNamespace(
            SecretNotFoundError=SecretNotFoundError,
            NotebookAccessError=NotebookAccessError,
            TimeoutException=TimeoutException,
            get=self.get,
        )

    def mount(self, place: str) -> None:
        self.asked.append(("mount", place))
        if self.refuses:
            raise self.refuses
        (Path(place) / "MyDrive").mkdir(parents=True)

    def get(self, name: str) -> str:
        self.asked.append(("secret", name))
        value = self.secrets.get(name, SecretNotFoundError(f"Secret {name} does not exist."))
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def fake(monkeypatch, tmp_path) -> FakeColab:
    """Colab around this process: its shell, its package, and a place for its Drive."""
    fake = FakeColab(tmp_path / "content" / "drive")
    package = types.ModuleType("google.colab")
    package.files, package.userdata = fake.files, fake.userdata
    package.drive = types.SimpleNamespace(mount=fake.mount)
    monkeypatch.setitem(sys.modules, "google", sys.modules.get("google") or types.ModuleType("google"))
    monkeypatch.setattr(sys.modules["google"], "colab", package, raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=ColabShell))
    monkeypatch.delenv(runtime.HEADLESS_VARIABLE, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(colab, "DRIVE", fake.drive)
    return fake


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> None:
    """A Jupyter that has no `google.colab`."""
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=ZMQInteractiveShell))
    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")


# ------------------------------------------------------------------------------------------------ where


def test_colab_is_told_by_its_shell_and_headless_is_not_colab(fake, monkeypatch):
    assert colab.is_colab()
    monkeypatch.setenv(runtime.HEADLESS_VARIABLE, "1")
    assert not colab.is_colab()


def test_jupyter_is_not_colab(elsewhere):
    assert not colab.is_colab()


def test_google_colab_is_named_in_no_other_module_and_in_no_notebook():
    assert importers(SOURCES, "google") == ["colab"] and importers(SOURCES, "google", outside_functions_only=True) == []
    sources = {path.stem: nbformat.read(path, 4).cells for path in NOTEBOOKS}
    code = {name: [cell.source for cell in cells if cell.cell_type == "code"] for name, cells in sources.items()}
    assert [name for name, cells in code.items() if any("google" in source for source in cells)] == []


# ------------------------------------------------------------------------------------------------ files


def test_a_file_goes_through_the_browser_with_its_size(fake, tmp_path):
    (tmp_path / "results.zip").write_bytes(b"x" * 1_200_000)
    assert colab.download(tmp_path / "results.zip") == "downloading results.zip (1.2 MB)"
    assert fake.asked == [("download", str(tmp_path / "results.zip"))]


def test_a_large_file_is_sent_with_a_warning(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(colab, "LARGE_DOWNLOAD", 10)
    (tmp_path / "results.zip").write_bytes(b"x" * 11)
    assert colab.download(tmp_path / "results.zip").endswith("a Drive folder is safer")
    assert len(fake.asked) == 1


def test_a_folder_is_refused_before_colab_is_asked(fake, tmp_path):
    with pytest.raises(ValueError, match="zip a folder first"):
        colab.download(tmp_path)
    assert fake.asked == []


def test_outside_colab_a_download_names_the_file(elsewhere, tmp_path):
    (tmp_path / "results.zip").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"not Colab.*results\.zip"):
        colab.download(tmp_path / "results.zip")


# ------------------------------------------------------------------------------------------------ Drive


def test_drive_is_mounted_once_and_gets_our_folder(fake):
    assert colab.drive_folder() is None
    assert colab.mount_drive() == colab.mount_drive() == colab.drive_folder() == fake.drive / "MyDrive" / "nbhelpers"
    assert (fake.drive / "MyDrive" / "nbhelpers").is_dir()
    assert fake.asked == [("mount", str(fake.drive))]


@pytest.mark.parametrize(
    "refusal",
    [MessageError("credential propagation was unsuccessful"), ValueError("mount failed"), KeyboardInterrupt()],
)
def test_a_refused_drive_is_none_and_one_line(fake, refusal):
    fake.refuses, said = refusal, []
    assert colab.mount_drive(said.append) is None
    assert len(said) == 1 and "\n" not in said[0] and "Drive was not mounted" in said[0]
    assert (str(refusal) or "KeyboardInterrupt") in said[0]


def test_a_mount_that_leaves_nothing_is_none_and_one_line(fake, monkeypatch):
    monkeypatch.setattr(sys.modules["google.colab"].drive, "mount", lambda place: None)
    said = []
    assert colab.mount_drive(said.append) is None and "has no" in said[0]


def test_a_drive_that_cannot_be_written_is_none_and_one_line(fake):
    (fake.drive / "MyDrive").mkdir(parents=True)
    (fake.drive / "MyDrive" / "nbhelpers").write_text("a file in the way")
    said = []
    assert colab.mount_drive(said.append) is None and "cannot write to Drive" in said[0]


def test_looking_for_a_drive_never_asks(fake):
    assert colab.drive_folder() is None and fake.asked == []


def test_outside_colab_there_is_no_drive_to_mount(elsewhere, caplog):
    with caplog.at_level(logging.WARNING):
        assert colab.mount_drive() is None
    assert "in Colab only" in caplog.text


# ------------------------------------------------------------------------------------------------ secrets


def test_the_environment_comes_before_colabs_secrets(fake, monkeypatch):
    fake.secrets["HF_TOKEN"] = "of Colab"
    assert colab.secret() == "of Colab"
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    assert colab.secret() == TOKEN and fake.asked == [("secret", "HF_TOKEN")]


@pytest.mark.parametrize("kind", [SecretNotFoundError, NotebookAccessError, TimeoutException])
def test_a_secret_that_colab_does_not_give_is_none(fake, kind):
    fake.secrets["HF_TOKEN"] = kind("HF_TOKEN")
    assert colab.secret() is None


def test_an_older_colab_without_its_third_exception_still_gives_its_secrets(fake):
    del fake.userdata.TimeoutException
    assert colab.secret("OTHER") is None
    fake.secrets["OTHER"] = TOKEN
    assert colab.secret("OTHER") == TOKEN


def test_an_error_that_is_no_refusal_is_not_swallowed(fake):
    fake.secrets["HF_TOKEN"] = RuntimeError("planned")
    with pytest.raises(RuntimeError, match="planned"):
        colab.secret()


def test_outside_colab_only_the_environment_has_secrets(elsewhere, monkeypatch):
    assert colab.secret() is None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert colab.secret() == TOKEN


def test_a_secret_is_neither_printed_nor_logged(fake, capfd, caplog):
    fake.secrets = {"HF_TOKEN": TOKEN, "OTHER": NotebookAccessError(TOKEN)}
    with caplog.at_level(logging.DEBUG):
        assert (colab.secret(), colab.secret("OTHER")) == (TOKEN, None)
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


# ------------------------------------------------------------------------------------------------ packages


class FakePip:
    """Installed versions, and what a `pip install` would do to them."""

    def __init__(self, **versions: str):
        self.versions, self.commands, self.held, self.brings = versions, [], "", {}
        self.returncode, self.stderr = 0, ""

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise colab.importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.held = Path(command[command.index("--constraint") + 1]).read_text()
        self.versions |= self.brings
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def pip(monkeypatch) -> FakePip:
    pip = FakePip(torch="2.11.0+cu128", numpy="2.1.3", typer="0.27.1", bitsandbytes="0.9.9")
    monkeypatch.setattr(colab.importlib.metadata, "version", pip.version)
    monkeypatch.setattr(colab.subprocess, "run", pip.run)
    return pip


def test_missing_is_what_is_absent_or_older_than_its_floor(pip):
    assert colab.missing_packages() == ["bitsandbytes>=0.48", "papermill>=2.6"]
    pip.versions |= {"bitsandbytes": "0.48", "papermill": "2.10.1"}
    assert colab.missing_packages() == []


def test_only_what_is_missing_is_installed_and_what_is_there_is_held(fake, pip):
    pip.brings = {"bitsandbytes": "0.50.2", "papermill": "2.7.0"}
    assert colab.install_missing() == "installed bitsandbytes 0.50.2, papermill 2.7.0"
    [command] = pip.commands
    assert command[-2:] == ["bitsandbytes>=0.48", "papermill>=2.6"] and command[0] == sys.executable
    assert pip.held == "torch==2.11.0+cu128\nnumpy==2.1.3\n"
    assert colab.install_missing() == "" and len(pip.commands) == 1


def test_a_protected_package_that_moved_is_said_in_one_sentence(fake, pip):
    pip.brings = {"bitsandbytes": "0.50.2", "papermill": "2.7.0", "numpy": "2.4.0"}
    said = colab.install_missing()
    assert "numpy 2.1.3 became 2.4.0" in said and "restart the session" in said and "\n" not in said


def test_without_a_connection_one_line_says_what_does_not_work(fake, pip):
    pip.returncode, pip.stderr = 1, "WARNING: Retrying\nERROR: No version found.\nERROR: Go away.\n"
    assert colab.install_missing() == (
        "could not install bitsandbytes (models in 8 or 4 bits), papermill (running notebooks without a person): "
        "No version found. Everything else works"
    )


def test_a_pip_that_hangs_is_given_up_with_one_line(fake, pip, monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired("pip", options["timeout"])

    monkeypatch.setattr(colab.subprocess, "run", hang)
    assert "timed out after 300 seconds" in colab.install_missing()


def test_outside_colab_nothing_is_installed(elsewhere, pip):
    assert colab.install_missing() == "" and pip.commands == []


def test_the_file_for_people_holds_the_same_lines():
    assert lines_of("requirements-colab.txt") == list(colab.OPTIONAL)


def test_what_is_optional_is_not_protected_and_the_protected_are_spelled_as_pip_spells_them():
    assert {line.split(">=")[0] for line in colab.OPTIONAL} & set(colab.PROTECTED) == set()
    installed = {name for name in colab.PROTECTED if colab._version(name)}
    assert {"torch", "numpy", "pillow", "ipywidgets", "ipython", "ipykernel", "tornado", "transformers"} <= installed


def test_a_real_pip_refuses_to_move_what_is_held(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = colab._install(["numpy>=999"], {"numpy": colab._version("numpy")})
    assert said.startswith("Cannot install numpy>=999") and "\n" not in said
