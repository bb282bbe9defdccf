"""How does a notebook travel alone? The package and one tiny model inside it: upload one file, run all.

The package's files are zipped as they lie here (no build, no network), and unpacked beside the notebook by its first
cell into a folder named by their content. The same notebook and package give the same bytes.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat

from nbhelpers import headless, models, records
from nbhelpers.report import FIXED_TIME

PACKAGE = Path(__file__).parent
DEFAULT_MODEL = "tiny-llama"  # what the notebooks run on where nothing else is asked for
MOST_BYTES = 12 * 10**6  # of one notebook; only 04, with both sides of its comparison inside, has more than 5 MB
LINE = 4096  # characters of base64: few lines, none too long for an editor
CELL_ID = "embedded-package"
SOURCE = '''#@title The package and {models}, carried by this notebook: run this cell first, nothing in it is to change
import base64, io, os, sys, zipfile

folder = "{folder}"  # named by its content
package = """
{content}
"""
if not os.path.isdir(folder):
    zipfile.ZipFile(io.BytesIO(base64.b64decode(package))).extractall(folder + ".part")
    os.replace(folder + ".part", folder)
sys.path.insert(0, os.path.abspath(folder))'''


def write_all(out: str | Path, names: Sequence[str] = ()) -> list[dict]:
    """Write these notebooks (all without names) as self-contained files into `out`: [{notebook, path, bytes, models}].

    LookupError where there are no notebooks (an installed package has none: run this in the project's folder) or for an
    unknown one; ValueError for one that does not fit into MOST_BYTES.
    """
    out, written = Path(out), []
    for path in headless.choose(names):
        notebook, carried = self_contained(nbformat.read(path, 4))
        text = nbformat.writes(notebook) + "\n"
        size = len(text.encode())
        if size > MOST_BYTES:
            raise ValueError(
                f"{path.stem} would have {size / 1e6:.1f} MB with {', '.join(carried)} and its outputs, "
                f"the limit is {MOST_BYTES / 1e6:.0f} MB: clear its outputs or let it begin with a smaller model"
            )
        out.mkdir(parents=True, exist_ok=True)
        records.write_atomic(out / path.name, text)
        written.append({"notebook": path.stem, "path": str(out / path.name), "bytes": size, "models": carried})
    return written


def self_contained(notebook: nbformat.NotebookNode) -> tuple[nbformat.NotebookNode, list[str]]:
    """A copy with one more cell, which carries the package, before the first code cell; and the models it carries.

    Outputs are kept: they are what a reader sees first.
    """
    carried = models_needed(notebook)
    content = package_zip(carried)
    source = SOURCE.format(
        models=" and ".join(carried),
        folder=f".nbhelpers-{hashlib.sha256(content).hexdigest()[:12]}",
        content="\n".join(_lines(base64.b64encode(content).decode("ascii"))),
    )
    hidden = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["nbval-ignore-output"]}
    cell = nbformat.v4.new_code_cell(source, id=CELL_ID, metadata=hidden)
    copy = nbformat.from_dict(notebook)
    first = next(number for number, other in enumerate(copy.cells) if other.cell_type == "code")
    copy.cells.insert(first, cell)
    return copy, carried


def models_needed(notebook: nbformat.NotebookNode) -> list[str]:
    """The bundled models that the parameters cell names, beside the default one."""
    named = {DEFAULT_MODEL}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            values = [node.value for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Constant)]
            named |= set(models.bundled_names()) & {value for value in values if isinstance(value, str)}
    return sorted(named)


def package_zip(carried: Iterable[str]) -> bytes:
    """The package with these bundled models alone, and a manifest that says so; the same bytes for the same files."""
    carried = set(carried)
    if missing := sorted(carried - set(models.bundled_names())):
        raise LookupError(f"bundled model {missing[0]!r} is not here: `make models` makes it again")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bundle:
        for name, content in sorted(_files(carried).items()):
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            bundle.writestr(entry, content, compresslevel=9)
    return buffer.getvalue()


def _files(carried: set[str]) -> dict[str, bytes]:
    files = {}
    for path in PACKAGE.rglob("*"):
        inside = path.relative_to(PACKAGE)
        left_out = inside.parts[:2] == ("assets", "models") and len(inside.parts) > 2 and inside.parts[2] not in carried
        if path.is_file() and "__pycache__" not in inside.parts and not left_out:
            files[f"{PACKAGE.name}/{inside.as_posix()}"] = path.read_bytes()
    manifest = records.read_json(PACKAGE / "assets" / "manifest.json")
    manifest["models"] = {name: made for name, made in manifest["models"].items() if name in carried}
    files[f"{PACKAGE.name}/assets/manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode("ascii")
    licence = PACKAGE.parent / "LICENSE"
    return files | ({"LICENSE": licence.read_bytes()} if licence.is_file() else {})


def _lines(text: str) -> list[str]:
    return [text[start : start + LINE] for start in range(0, len(text), LINE)]
