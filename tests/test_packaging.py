"""Do the files that say what to install agree, and does installing never move what is already there?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_repository import SOURCES, imports

import nbhelpers

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
DECLARED = RUNTIME + [requirement for lines in EXTRAS.values() for requirement in lines]

# A running Colab session holds these open: replacing one asks the user for a restart.
PROTECTED = {"torch", "numpy", "pandas", "pillow", "ipywidgets", "ipython", "ipykernel", "tornado"}
# Where the second environment differs from Colab, and why.
NOT_AS_IN_COLAB = {"torch": "Colab's 2.11.0+cu128 is a CUDA build; the tests need one for machines without a GPU"}


def lines_of(name: str) -> list[str]:
    rows = (row.split("#")[0].strip() for row in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row]


def pins(rows: list[str]) -> dict[str, str]:
    """canonical name -> version of `name==version` rows."""
    parts = [row.split("==") for row in rows]
    return {canonicalize_name(name): version for name, version in parts}


def unmet(requirements: list[Requirement], versions: dict[str, str]) -> list[str]:
    """Requirements whose name is among `versions` but whose version there does not satisfy them."""
    rows = [(need, versions.get(canonicalize_name(need.name))) for need in requirements]
    return [f"{need} but {version}" for need, version in rows if version and not need.specifier.contains(version)]


def colab_versions(data_dir: Path) -> dict[str, str]:
    rows = (data_dir / "colab_freeze_2026-08-19_gpu.txt").read_text(encoding="utf-8").splitlines()
    return pins([row for row in rows if "==" in row and not row.startswith("#")])


CONSTRAINTS = pins(lines_of("constraints.txt"))
COLAB_CONSTRAINTS = pins(lines_of("constraints-colab.txt"))

# ------------------------------------------------------------------------------------------------ the files agree


def test_the_version_stands_in_one_place_and_the_installed_one_is_the_same():
    assert "version" in PROJECT["dynamic"]
    assert str(Version(nbhelpers.__version__)) == nbhelpers.__version__
    assert importlib.metadata.version("nbhelpers") == nbhelpers.__version__


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-colab.txt"])
def test_constraints_are_exact_versions_without_addresses_or_local_builds(name):
    assert [row for row in lines_of(name) if not re.fullmatch(r"[\w.-]+==[\w.!]+", row)] == []
    assert [row for row in lines_of(name) if row.startswith(("nvidia", "triton", "cuda"))] == []


def test_torch_is_pinned_bare_so_that_each_machine_gets_its_own_build():
    assert "torch==2.13.0" in lines_of("constraints.txt")


def test_every_declared_dependency_is_pinned_and_the_pin_satisfies_its_floor():
    assert {canonicalize_name(need.name) for need in DECLARED} <= set(CONSTRAINTS)
    assert unmet(DECLARED, CONSTRAINTS) == []


def test_a_pin_below_its_floor_is_found():
    assert unmet([Requirement("torch>=2.9")], {"torch": "2.8.0"}) == ["torch>=2.9 but 2.8.0"]


def test_dependencies_are_floors_so_that_an_existing_environment_never_has_to_go_back():
    operators = {(need.name, part.operator) for need in DECLARED for part in need.specifier}
    assert {name for name, operator in operators if operator != ">="} == set()
    assert all(need.specifier and not need.url for need in DECLARED)


def test_the_conda_file_holds_the_same_versions():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert pins(re.findall(r"^ {6}- (\S+==\S+)$", text, flags=re.MULTILINE)) == CONSTRAINTS
    python = re.search(r"^  - python=(\S+)$", text, flags=re.MULTILINE).group(1)
    assert python in PROJECT["requires-python"]


def test_every_package_that_is_imported_is_declared():
    known = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(need.name) for need in DECLARED}
    faults = []
    for module, source in SOURCES.items():
        for name, line, _ in imports(source):
            top = name.split(".")[0]
            optional = top in ("google", "IPython", "torch_xla", "kaggle_secrets")  # a host's own, behind detection
            if top in sys.stdlib_module_names or top == "nbhelpers" or optional:
                continue
            if not {canonicalize_name(dist) for dist in known.get(top, [top])} & declared:
                faults.append(f"nbhelpers/{module}.py:{line}: {top} is in no dependency or extra")
    assert faults == []


def test_this_environment_holds_the_versions_it_was_built_from():
    """Only said of the two environments that `make` builds; another one is the user's own."""
    expected = {".venv": CONSTRAINTS, ".venv-colab": COLAB_CONSTRAINTS}.get(Path(sys.prefix).name)
    if expected is None:
        pytest.skip(f"not an environment of make: {Path(sys.prefix).name}")
    installed = {canonicalize_name(dist.name): dist.version for dist in importlib.metadata.distributions()}
    moved = {name: installed[name] for name in expected if name in installed}
    assert {name: version.split("+")[0] for name, version in moved.items()} == {name: expected[name] for name in moved}


# ------------------------------------------------------------------------------------------------ Colab


def test_the_colab_file_names_no_protected_package_and_no_exact_version():
    needs = [Requirement(line) for line in lines_of("requirements-colab.txt")]
    assert {canonicalize_name(need.name) for need in needs} & PROTECTED == set()
    assert {part.operator for need in needs for part in need.specifier} == {">="}


@pytest.mark.data
def test_colab_meets_every_floor(data_dir):
    needs = DECLARED + [Requirement(line) for line in lines_of("requirements-colab.txt")]
    assert unmet(needs, colab_versions(data_dir)) == []


@pytest.mark.data
def test_the_second_environment_has_colabs_versions(data_dir):
    colab = {name: version.split("+")[0] for name, version in colab_versions(data_dir).items()}
    shared = set(COLAB_CONSTRAINTS) & set(colab)
    assert {name for name in shared if COLAB_CONSTRAINTS[name] != colab[name]} == set(NOT_AS_IN_COLAB)
    assert PROTECTED | {"transformers", "peft", "accelerate", "datasets"} <= shared


def stand_in_environment(folder: Path, versions: dict[str, str]) -> Path:
    """An environment in which pip sees these packages as installed; returns its Python.

    Only names and versions are there: what counts is which of them pip would replace.
    """
    venv.create(folder, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return folder / "bin" / "python"


def would_install(python: Path, requirements: Path, *options: str | Path) -> dict[str, str]:
    """canonical name -> version of what pip would install there for Python 3.13, installing nothing."""
    report = requirements.with_suffix(".json")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--dry-run", "--report", report]
    command += ["--python-version", "3.13", "--only-binary=:all:", "-r", requirements, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(row["metadata"]["name"]): row["metadata"]["version"] for row in rows}


@pytest.mark.slow
@pytest.mark.data
def test_installing_in_colab_moves_none_of_its_packages(data_dir, tmp_path):
    colab = colab_versions(data_dir)
    python = stand_in_environment(tmp_path / "colab", colab)
    wanted = tmp_path / "wanted.txt"
    tested = [f"{name} == {version}" for name, version in COLAB_CONSTRAINTS.items() if name not in colab]
    wanted.write_text("\n".join([*lines_of("requirements-colab.txt"), *map(str, RUNTIME)]))
    (tmp_path / "tested.txt").write_text("\n".join(tested))  # a release of tomorrow is no change of this project
    new = would_install(python, wanted, "-c", tmp_path / "tested.txt")
    assert {"bitsandbytes", "papermill"} <= set(new), "the two that Colab lacks"
    assert {name: (colab[name], version) for name, version in new.items() if name in colab} == {}


@pytest.mark.slow
@pytest.mark.data
def test_a_requirement_that_would_move_a_colab_package_is_found(data_dir, tmp_path):
    colab = colab_versions(data_dir)
    python = stand_in_environment(tmp_path / "colab", colab)
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("ipywidgets>=8\n")
    moved = set(would_install(python, wanted)) & set(colab) & PROTECTED
    assert "ipywidgets" in moved


# ------------------------------------------------------------------------------------------------ the wheel


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_bundled_file(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "nbhelpers", source / "nbhelpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = tmp_path.glob("nbhelpers-*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("nbhelpers/")}
    files = {str(path.relative_to(source)) for path in (source / "nbhelpers").rglob("*") if path.is_file()}
    assert inside == files
