"""Do the rules that matter hold over the whole repository: imports point down, notebooks are thin, nothing leaks?"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbhelpers"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A module imports from its own level or below, and there is no cycle. A new module needs a line here and in README.
LEVELS = {
    7: "cli commands commands_runs commands_training commands_evaluation commands_sweep commands_masks "
    "commands_comparison __main__",
    6: "widgets panel pruning_panel staged_panel fine_tuning_panel head_map analysis_panel notebook headless "
    "selfcontained sweep_panel sweep_form sweep_cell sweep_results tick_boxes comparison_panel comparison_form "
    "comparison_live comparison_before comparison_said",
    5: "plots plots_runs plots_runs_pruning plots_runs_curves plots_runs_settings analysis_plots plots_training "
    "plots_pruning report earlier selfcheck equivalents example_grid overview overview_html sparsity_report "
    "plots_sparsity sparsity_results sparsity_answers sparsity_tables sparsity_html "
    "plots_comparison plots_comparison_curves plots_comparison_size plots_comparison_use comparison_report "
    "comparison_tables comparison_html run_report",
    4: "experiments stages fine_tuning durations tryout search grid ledger jobkinds prefetch sparsity_price attempts "
    "retry_rules sweep sweep_pace workers ray_engine ray_connection sparsity pruning_grid weight_pruning "
    "external_results comparison comparison_config comparison_data comparison_answers comparison_pace "
    "comparison_results model_card migration interviews",
    3: "heads facts training trainer answer_cache kept_answers evaluation optimization preparation checkpoints "
    "sparse_lora masked_adapters merging mask_sets calibration mask_choice masked_training cerebras label_answers "
    "baselines analysis selection journal pretrain pretrain_measure lmeval",
    2: "evaluate scoring generation tasks answers importance sparsegpt layer_inputs masks mask_files mask_statistics "
    "mask_patterns mask_selection shared_models channels dialogues label_split prompts coding_metrics verdicts "
    "break_even routing costs ensemble budget",
    1: "models predictions adapters packing losses compact architecture catalogue attention data instructions "
    "task_files memory estimates colab machine faster_layers projections masked_linear quantization",
    0: "__init__ registry strict errors ranks records redaction runlock runlog runs collection tables tracking runtime "
    "stats curves generated generated_words generated_tasks run_config manifest linefile summaries experiment_log "
    "exports yaml_files icd10 generated_dialogues near_duplicates",
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules.split()}
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.py"))}

# ------------------------------------------------------------------------------------------------ reading imports


def imports(source: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it runs later or never) of every import, also importlib's by literal name."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(filter(None, ["nbhelpers" if child.level else None, child.module]))
                yield from ((f"{base}.{alias.name}", child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.Call) and (name := lazily_imported(child)):
                yield name, child.lineno, inside
            deeper = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_for_types_only(child)
            yield from visit(child, inside or deeper)

    return visit(ast.parse(source), False)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")


def lazily_imported(call: ast.Call) -> str:
    """The literal name that `importlib.import_module` gets; empty for any other call."""
    literal = call.args and isinstance(call.args[0], ast.Constant)
    return str(call.args[0].value) if literal and dotted(call.func).endswith("import_module") else ""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def own_modules(source: str, modules: set[str]) -> dict[str, int]:
    """The package's modules that `source` imports, each with the line."""
    found = {}
    for name, line, _ in imports(source):
        head, _, rest = name.partition(".")
        if head == "nbhelpers":
            part = rest.partition(".")[0]
            found.setdefault(part if part in modules else "__init__", line)
    return found


def layering_faults(sources: dict[str, str], level: dict[str, int]) -> list[str]:
    faults = []
    for module, source in sources.items():
        if module not in level:
            faults.append(f"nbhelpers/{module}.py is in no level: give it a line in LEVELS")
            continue
        for imported, line in own_modules(source, set(sources) | set(level)).items():
            if level.get(imported, 99) > level[module]:
                faults.append(
                    f"nbhelpers/{module}.py:{line}: level {level[module]} imports {imported} of level "
                    f"{level.get(imported, 'none')}"
                )
    return faults


def cycle(sources: dict[str, str]) -> list[str]:
    """One import cycle as the list of its modules, the first one repeated at the end; empty where there is none."""
    edges = {module: own_modules(source, set(sources)) for module, source in sources.items()}
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in edges:
            return []
        for imported in edges[module]:
            if found := walk(imported, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := walk(module, []))), [])


def importers(sources: dict[str, str], package: str, outside_functions_only: bool = False) -> list[str]:
    """Modules that import `package` or a part of it."""
    return [
        module
        for module, source in sources.items()
        if any(
            (name == package or name.startswith(package + ".")) and not (inside and outside_functions_only)
            for name, _, inside in imports(source)
        )
    ]


# ------------------------------------------------------------------------------------------------ layers


def test_every_import_points_to_its_own_level_or_below():
    assert not layering_faults(SOURCES, LEVEL)


def test_an_import_upwards_is_found_also_inside_a_function():
    sources = {"stats": "def f():\n    from nbhelpers import models\n", "models": ""}
    assert layering_faults(sources, LEVEL) == ["nbhelpers/stats.py:2: level 0 imports models of level 1"]


def test_a_module_without_a_level_is_found():
    assert layering_faults({"helpers2": ""}, LEVEL) == [
        "nbhelpers/helpers2.py is in no level: give it a line in LEVELS"
    ]


def test_no_module_imports_itself_through_others():
    assert cycle(SOURCES) == []


def test_a_cycle_is_found_whatever_way_its_imports_are_written():
    sources = {
        "a": "import nbhelpers.b",
        "b": "def f():\n    from .c import x",
        "c": "import importlib\nimportlib.import_module('nbhelpers.a')",
    }
    assert cycle(sources) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "package, modules",
    [
        (
            "matplotlib",
            {
                *("plots", "analysis_plots", "plots_training", "plots_pruning", "plots_sparsity", "plots_comparison"),
                *("plots_runs", "plots_runs_pruning", "plots_runs_curves", "plots_runs_settings"),
                *("plots_comparison_curves", "plots_comparison_size", "plots_comparison_use"),
                "comparison_html",  # the type of what it embeds
            },
        ),
        (
            "ipywidgets",
            {
                *("widgets", "panel", "pruning_panel", "staged_panel", "head_map", "fine_tuning_panel"),
                "analysis_panel",
                "sweep_panel",
                "tick_boxes",
                "comparison_panel",
            },
        ),
    ],
)
def test_few_modules_alone_import(package, modules):
    assert set(importers(SOURCES, package)) <= modules


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_the_lowest_level_and_the_figures_import_heavy_packages_only_inside_functions(package):
    low = {name: text for name, text in SOURCES.items() if LEVEL.get(name) == 0}
    assert importers(low, package, outside_functions_only=True) == []
    figures = ("plots", "analysis_plots", "plots_training", "report")
    shown = {name: text for name, text in SOURCES.items() if name in figures or name.startswith("plots_runs")}
    assert importers(shown, package) == []


def test_google_colab_is_imported_in_one_module_and_only_inside_functions():
    assert len(importers(SOURCES, "google.colab")) <= 1
    assert importers(SOURCES, "google.colab", outside_functions_only=True) == []


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, nbhelpers; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ forbidden calls

SEEDING = {
    *("random.seed", "np.random.seed", "numpy.random.seed", "torch.manual_seed", "torch.random.manual_seed"),
    *("torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.mps.manual_seed"),
    *("transformers.set_seed", "accelerate.utils.set_seed", "pl.seed_everything"),
}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def call_faults(module: str, source: str) -> list[str]:
    """What a module must not do: seed global generators (but runtime), unpickle, or run foreign code."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        where, name = f"nbhelpers/{module}.py:{node.lineno}:", dotted(node.func)
        keywords = {word.arg: word.value for word in node.keywords}
        if name in SEEDING and module != "runtime":
            faults.append(f"{where} {name} seeds a global generator: only runtime.set_seed may")
        if name.endswith("torch.load") and not is_constant(keywords.get("weights_only"), True):
            faults.append(f"{where} torch.load without weights_only=True unpickles")
        if name == "yaml.load" or name.endswith("allow_pickle"):
            faults.append(f"{where} {name}: use yaml.safe_load")
        for word in ("trust_remote_code", "allow_pickle"):
            if word in keywords and not is_constant(keywords[word], False):
                faults.append(f"{where} {word} must be False or left out")
    for name, line, _ in imports(source):
        if name.split(".")[0] in PICKLES:
            faults.append(f"nbhelpers/{module}.py:{line}: imports {name.split('.')[0]}, which unpickles")
        if name in SEEDING and module != "runtime":
            faults.append(f"nbhelpers/{module}.py:{line}: imports {name}: only runtime.set_seed may seed")
    return faults


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_seeds_unpickles_or_runs_foreign_code():
    assert [fault for module, source in SOURCES.items() for fault in call_faults(module, source)] == []


@pytest.mark.parametrize(
    "line, fault",
    [
        ("torch.manual_seed(0)", "seeds a global generator"),
        ("from transformers import set_seed", "only runtime.set_seed may seed"),
        ("import pickle", "which unpickles"),
        ("torch.load(path)", "without weights_only=True"),
        ("torch.load(path, weights_only=flag)", "without weights_only=True"),
        ("Auto.from_pretrained(name, trust_remote_code=flag)", "trust_remote_code must be False"),
        ("np.load(path, allow_pickle=True)", "allow_pickle must be False"),
        ("yaml.load(text)", "use yaml.safe_load"),
    ],
)
def test_a_forbidden_line_is_found(line, fault):
    assert [fault in found for found in call_faults("models", line)] == [True]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "generator.manual_seed(0)",
        "torch.Generator().manual_seed(0)",
        "Auto.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_an_allowed_line_is_let_through(line):
    assert call_faults("models", line) == []


# ------------------------------------------------------------------------------------------------ thin notebooks

IGNORED_TAGS = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception", "raises-exception"}
IGNORED_COMMENTS = (
    "# NBVAL_IGNORE_OUTPUT",
    "# NBVAL_SKIP",
    "# PYTEST_VALIDATE_IGNORE_OUTPUT",
    "# NBVAL_RAISES_EXCEPTION",
)
BUILDING = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar),
)


def python_of(source: str) -> str:
    """A cell's Python, each line magic or shell line replaced by `pass`."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


def notebook_faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Every rule for committed notebooks that this one breaks."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    faults = []
    if len(cells) > 12:
        faults.append(f"{len(cells)} code cells: at most 12")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        faults.append("the kernel must be python3")
    extra = sorted({"widgets", "papermill"} & set(notebook.metadata))
    faults += [f"metadata holds {name}: clean it before committing" for name in extra]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        faults.append(f"cells must be counted 1 to {len(cells)}, got {[cell.execution_count for cell in cells]}")
    ignored = [cell for cell in cells if is_ignored(cell)]
    if len(ignored) > 2:
        faults.append(f"{len(ignored)} cells are not compared: at most 2")
    parameters = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(parameters) == 1:
        faults += parameter_faults(parameters[0].source)
    else:
        faults.append(f"{len(parameters)} cells are tagged parameters: exactly 1")
    for number, cell in enumerate(cells, start=1):
        faults += [f"cell {number}: {fault}" for fault in cell_faults(cell)]
    return faults


def is_ignored(cell: nbformat.NotebookNode) -> bool:
    lines = [line.strip() for line in cell.source.splitlines()]
    return bool(IGNORED_TAGS & set(cell.metadata.get("tags", []))) or any(line in IGNORED_COMMENTS for line in lines)


def cell_faults(cell: nbformat.NotebookNode) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(python_of(cell.source))):
        if isinstance(node, BUILDING):
            faults.append(f"{type(node).__name__}: functions, classes, loops and try belong in the package")
    if any(output.output_type == "error" for output in cell.outputs):
        faults.append("holds an error output")
    extra = sorted({"execution", "papermill"} & set(cell.metadata))
    return faults + [f"metadata holds {name}: clean it before committing" for name in extra]


def parameter_faults(source: str) -> list[str]:
    """Each line of the parameters cell is `name: type = literal  # what it is`."""
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    faults = []
    for node in ast.parse(source).body:
        text = ast.unparse(node)
        if not (isinstance(node, ast.AnnAssign) and node.value is not None and is_literal(node.value)):
            faults.append(f"parameter `{text}` must be an annotated literal")
        elif node.end_lineno not in comments:
            faults.append(f"parameter `{text}` needs a comment on its line")
    return faults


def is_literal(node: ast.AST) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def thin_notebook() -> nbformat.NotebookNode:
    """A notebook that keeps every rule."""
    new = nbformat.v4
    cells = [
        new.new_code_cell("import nbhelpers\n%matplotlib inline", execution_count=1),
        new.new_code_cell("level: float = 0.3  # share of heads, 0-1", execution_count=2),
        new.new_code_cell("print(level)", execution_count=3),
    ]
    cells[1].metadata["tags"] = ["parameters"]
    cells[2].outputs = [new.new_output("stream", name="stdout", text="0.3\n")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_thin_executed_and_clean(path):
    assert notebook_faults(nbformat.read(path, as_version=4)) == []


def test_the_example_of_a_thin_notebook_breaks_no_rule():
    assert notebook_faults(thin_notebook()) == []


def tag_all(notebook):
    for cell in notebook.cells:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "nbval-ignore-output"]


SPOILED = {
    "13 code cells": lambda nb: nb.cells.extend([nbformat.v4.new_code_cell("1")] * 10),
    "kernel must be python3": lambda nb: nb.metadata.kernelspec.update(name="my-env"),
    "metadata holds widgets": lambda nb: nb.metadata.update(widgets={}),
    "metadata holds papermill": lambda nb: nb.metadata.update(papermill={}),
    "counted 1 to 3, got [1, 3, 3]": lambda nb: nb.cells[1].update(execution_count=3),
    "counted 1 to 3, got [None, 2, 3]": lambda nb: nb.cells[0].update(execution_count=None),
    "3 cells are not compared": tag_all,
    "0 cells are tagged parameters": lambda nb: nb.cells[1].metadata.update(tags=[]),
    "cell 3: FunctionDef": lambda nb: nb.cells[2].update(source="def f(): ..."),
    "cell 3: For": lambda nb: nb.cells[2].update(source="for x in []:\n    x"),
    "cell 3: Try": lambda nb: nb.cells[2].update(source="try:\n    x = 1\nfinally:\n    pass"),
    "cell 3: Lambda": lambda nb: nb.cells[2].update(source="f = lambda: 1"),
    "cell 3: holds an error output": lambda nb: nb.cells[2].update(
        outputs=[nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]
    ),
    "cell 3: metadata holds execution": lambda nb: nb.cells[2].metadata.update(execution={}),
    "`level = 0.3` must be an annotated literal": lambda nb: nb.cells[1].update(source="level = 0.3  # share"),
    "`level: float = 3 / 10` must be an": lambda nb: nb.cells[1].update(source="level: float = 3 / 10  # share"),
    "`level: float = 0.3` needs a comment": lambda nb: nb.cells[1].update(source="level: float = 0.3"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_notebook_that_breaks_a_rule_is_found(fault):
    notebook = thin_notebook()
    SPOILED[fault](notebook)
    assert any(fault in found for found in notebook_faults(notebook)), notebook_faults(notebook)


# ------------------------------------------------------------------------------------------------ what is committed

# Addresses that text may name: papers, licences, model cards, schema names. No index, no mirror, nothing invented.
KNOWN_HOSTS = {
    *("arxiv.org", "doi.org", "aclanthology.org", "huggingface.co", "www.apache.org", "opensource.org"),
    *("json-schema.org", "www.w3.org", "127.0.0.1", "localhost"),
}
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|Users|root|work|tmp|mnt|opt|private|srv)/[\w.-]")
ADDRESS = re.compile(r"\b(?:https?|git\+https?|ftp)://(?:[\w.-]+@)?([\w.-]+)", re.IGNORECASE)
INDEX = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host")


def text_faults(name: str, text: str) -> list[str]:
    """Paths of one machine and hosts that are not on the list."""
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        if found := MACHINE_PATH.search(line):
            faults.append(f"{name}:{number}: path of one machine: {line[found.start() : found.start() + 40]!r}")
        if found := INDEX.search(line):
            faults.append(f"{name}:{number}: names a package index: {found.group()}")
        hosts = {host.lower() for host in ADDRESS.findall(line)} - KNOWN_HOSTS
        faults += [f"{name}:{number}: host {host} is not in KNOWN_HOSTS" for host in sorted(hosts)]
    return faults


def committed_files() -> list[Path]:
    """What git tracks or would add; the whole list is empty where this is no checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_committed_text_names_no_machine_path_and_no_unknown_host():
    files = committed_files()
    if not files:
        pytest.skip("this is no git checkout")
    faults = []
    for path in files:
        if path.name == Path(__file__).name or path.suffix in (".safetensors", ".png", ".zip"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        faults += text_faults(str(path.relative_to(ROOT)), text)
    assert faults == []


@pytest.mark.parametrize(
    "line, fault",
    [
        ("saved to /home/ada/runs", "path of one machine"),
        ("'/tmp/x'", "path of one machine"),
        ("pip install --extra-index-url x", "names a package index"),
        ("see https://wheels.example.org/simple", "host wheels.example.org"),
        ("git+https://token@git.example.org/x", "host git.example.org"),
    ],
)
def test_a_line_that_leaks_is_found(line, fault):
    assert [fault in found for found in text_faults("a", line)] == [True]


@pytest.mark.parametrize("line", ["see https://arxiv.org/abs/1905.10650", "runs/home/x", "work/tmp", "a /home page"])
def test_a_line_that_leaks_nothing_is_let_through(line):
    assert text_faults("a", line) == []


def test_no_committed_file_is_larger_than_six_megabytes():
    assert [path.name for path in committed_files() if path.stat().st_size > 6 * 2**20] == []


# ------------------------------------------------------------------------------------------------ README


def readme_tree(text: str) -> dict[str, str]:
    """name of a package file -> its one line, from the indented lines under `nbhelpers/` in the README's tree."""
    block = re.search(r"^nbhelpers/.*\n((?:^ +.*\n)+)", text, flags=re.MULTILINE)
    rows = re.findall(r"^ +(\w+\.py) +(.*)$", block.group(1), flags=re.MULTILINE) if block else []
    return dict(rows)


def test_the_tree_in_the_readme_lists_exactly_the_files_of_the_package():
    listed = set(readme_tree((ROOT / "README.md").read_text(encoding="utf-8")))
    there = {f"{module}.py" for module in SOURCES}
    add = [
        f"    {name:<20}{(ast.get_docstring(ast.parse(SOURCES[name[:-3]])) or '').splitlines()[:1]}"
        for name in sorted(there - listed)
    ]
    assert (add, sorted(listed - there)) == ([], []), "lines to add to, and names to take out of, the tree in README.md"


def test_every_module_begins_with_the_question_it_answers():
    first = {module: (ast.get_docstring(ast.parse(source)) or "").split("\n")[0] for module, source in SOURCES.items()}
    assert [module for module, line in first.items() if not 10 <= len(line) <= 120] == []


def test_every_make_target_in_the_readme_exists():
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"run", "test"} <= named <= targets


def test_bundled_json_is_strict():
    def refuse(value: str) -> None:
        raise ValueError(f"not strict JSON: {value}")

    for path in sorted((PACKAGE / "assets").rglob("*.json")):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
