"""Does the panel of a sweep say what it costs, refuse what makes no sense, and do each job once whatever happens?"""

from __future__ import annotations

import shlex
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from nbhelpers import grid, headless, mask_sets, notebook, plots, records, shared_models, sweep, sweep_cell, workers
from nbhelpers.ledger import Ledger
from nbhelpers.runs import read_run
from nbhelpers.sweep_form import SHARED, SweepConfig, from_plan, texts, unfinished, write_plan
from nbhelpers.sweep_panel import NEW, THIS, SweepPanel, tiles
from nbhelpers.sweep_results import SweepResults
from nbhelpers.tracking import Interrupted

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "03_sparse_sweep.ipynb"
TINY = {"models": "tiny-gpt2", "tasks": "boolq", "sparsities": "0, 0.5", "steps": 1, "limit": 4}
TINY |= {"more": {"batch_size": 2, "device": "cpu"}}


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    shared_models.release()
    mask_sets.release()


def panel(root: Path, **changes) -> SweepPanel:
    made = SweepPanel(root=root, **TINY | changes)
    made._estimator.cancel()  # a test asks for it itself
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A panel whose sweep of 8 rows and 5 jobs is done, one of them explained first."""
    made = panel(tmp_path_factory.mktemp("panel") / "runs")
    made.said_first = made.said_before()
    made.cell = made.one_cell()
    made.done_first = made.counts(made.config())["done"]
    made._run_clicked()
    made.wait(300)
    return made


def jobs_done(folder: Path) -> list[str]:
    """The job of every finished run directory of a sweep."""
    return sorted(path.parent.name.rpartition("-")[0] for path in folder.glob("runs/*/result.json"))


# before ---------------------------------------------------------------------------------------------------------------


def test_the_counts_shown_are_those_of_the_preview_of_the_same_plan(tmp_path):
    made = panel(tmp_path, models="tiny-gpt2, tiny-llama", methods="unstructured, random, taylor", seeds="0, 1")
    found = sweep.preview(made.config().plan())
    made._show_estimate()
    assert (found["rows"], found["jobs"]) == (2 * 2 * 3 * 2 * 2, 2 * 2 * (1 + 3 * 2))
    for name in ("trainings", "evaluations", "loads", "scorings"):
        assert f"<b>{found['price'][name]}</b>{name}" in made.before.value
    assert "<b>48</b>rows" in made.before.value and "about " in made.estimate.value


def test_the_twelve_row_plan_is_what_the_form_says_at_first():
    plan = grid.read_plan(ROOT / "plans" / "sparsity_12.yaml")
    first = SweepConfig(**{name: value for name, value in plan.base.items() if name in SHARED})
    committed = grid.expand(plan)
    ours = grid.expand(grid.read_plan(first.plan()))
    assert list(ours.jobs) == list(committed.jobs) and len(ours.rows) == len(committed.rows) == 12
    assert dict(tiles(sweep.preview(first.plan()))[:2]) == {"12": "rows", "9": "trainings"}


def test_downloads_and_disk_stand_among_the_counts():
    price = {
        "trainings": 1,
        "evaluations": 2,
        "loads": 1,
        "scorings": 0,
        "downloads": {"a/b": 2_500_000_000, "c/d": None},
    }
    told = tiles({"rows": 1000, "price": price | {"disk_bytes": 3_000_000}})
    assert [f"{number} {name}" for number, name in told] == [
        *("1,000 rows", "1 training", "2 evaluations", "1 load", "0 scorings"),
        *("2.5 GB and more to download", "3 MB on disk"),
    ]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("models", "tiny-gtp2", "unknown model 'tiny-gtp2'. Did you mean 'tiny-gpt2'"),
        ("tasks", "boolq, perplexity", "unknown task 'perplexity'"),
        ("methods", "", "name at least one"),
        ("sparsities", "0, 1.5", "must be in [0, 1], got 1.5"),
        ("sparsities", "0.5, 0.5", "0.5 stands there twice"),
        ("sparsities", "half", "must be a valid number"),
        ("modes", "dense", "unknown mode 'dense'"),
        ("seeds", "-1", "must be in [0, 2**32), got -1"),
    ],
)
def test_a_value_that_makes_no_sense_is_said_beside_it_and_run_is_refused(field, value, said, tmp_path):
    made = panel(tmp_path)
    made.form.put({field: value})
    assert said.replace("'", "&#x27;") in made.form.controls[field].refusal.value, made.form.controls[
        field
    ].refusal.value
    assert made.run_button.disabled and "refused" in made.status.value
    with pytest.raises(ValidationError, match=field):
        made.run_now()
    made.form.put({field: texts(SweepConfig(models="tiny-gpt2"))[field]})
    assert not made.run_button.disabled and made.form.controls[field].refusal.value == ""


def test_groups_of_four_take_sparsities_in_quarters_alone(tmp_path):
    made = panel(tmp_path, sparsities="0, 0.9")
    made.form.put({"methods": "nm"})
    assert "multiples of 0.25, got 0.9" in made.form.controls["sparsities"].refusal.value
    made.form.put({"sparsities": "0, 0.75"})
    assert made.form.config().sparsities == (0, 0.75)


def test_one_file_of_rows_cannot_serve_two_tasks(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    made = panel(tmp_path, data=str(rows))
    made.form.put({"tasks": "boolq, gsm8k"})
    assert "holds the rows of one task" in made.form.controls["data"].refusal.value


def test_ticks_write_the_list_and_what_is_written_is_ticked(tmp_path):
    made = panel(tmp_path)
    text, *boxes = made.form.controls["methods"].parts
    by_name = {box.description: box for box in boxes}
    by_name["structured"].value, by_name["random"].value = True, False
    assert made.config().methods == ("unstructured", "structured")
    text.value = "wanda"
    assert [name for name, box in by_name.items() if box.value] == ["wanda"]
    models_text = made.form.controls["models"].parts[0]
    models_text.value = "tiny-gpt2, owner/name"
    next(box for box in made.form.controls["models"].parts[1:] if box.description == "tiny-opt").value = True
    assert made.config().models == ("tiny-gpt2", "tiny-opt", "owner/name"), "a name without a box stays"
    made.form.enable(False)
    assert all(box.disabled for box in boxes)


# one cell -------------------------------------------------------------------------------------------------------------


def test_the_cell_that_is_explained_is_a_job_of_the_sweep_and_done_once(finished):
    assert finished.done_first == 1 and finished.cell.run_dir.parent.parent == finished.seen.folder
    done = jobs_done(finished.seen.folder)
    assert len(done) == len(set(done)) == 5
    values = grid.expand(grid.read_plan(finished.config().plan())).rows[finished.cell.row - 1].values
    assert values == {"method": "unstructured", "sparsity": 0.5, "mode": "sparse_to_sparse"}


def test_the_numbers_of_the_explained_cell_are_those_of_its_record(finished):
    result = read_run(finished.cell.run_dir).result
    said = str(finished.cell)
    assert f"{result['mask']['masked']:,} of {result['mask']['numbers']:,} weights" in said and "50.00%" in said
    assert "gives the logits of the trained model: True" in said and "not zero after it: 0\n" in said
    assert f"acc on 4 documents: {result['dense']['acc']:.3g}" in said.replace("0.500", "0.5").replace("0.750", "0.75")


def test_the_corner_that_is_drawn_is_of_the_weights_themselves(finished):
    piece = finished.cell.piece
    assert ((piece["masked"] == 0) == ~piece["kept"]).all(), "a weight that is 0 by itself would be a wonder"
    assert (piece["masked"] == piece["dense"])[piece["kept"]].all()
    assert (piece["tuned"][~piece["kept"]] == 0).all() and (piece["learned"][piece["kept"]] != 0).any()
    assert len(finished.cell.figure().axes) == 5


def test_what_fills_a_zero_again_is_framed(tmp_path):
    cell = panel(tmp_path, modes="sparse_to_dense", sparsities="0.5").one_cell()
    revived = (~cell.piece["kept"] & (cell.piece["tuned"] != 0)).sum()
    assert revived > 0 and "(they were free to fill)" in str(cell)
    merged = cell.figure().axes[3]
    assert len(merged.lines) == revived


def test_a_sweep_without_zeros_is_explained_without_a_mask(tmp_path):
    cell = panel(tmp_path, sparsities="0").one_cell()
    assert cell.piece is None and "mask" not in str(cell) and len(cell.figure().axes) == 1


def test_a_mask_that_is_gone_is_named(finished, tmp_path):
    cell = sweep_cell.Cell(1, 1, tmp_path / "runs" / "x", finished.cell.result)
    with pytest.raises(LookupError, match="the masks of the sweep are gone"):
        sweep_cell._mask(cell)


# the sweep ------------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_what_the_form_said(finished):
    assert finished.state == "finished", finished.error.value
    assert finished.said_first.startswith("8 rows -> 5 trainings, 8 evaluations, 1 load, 2 scorings")
    ledger = Ledger(finished.seen.folder)
    assert ledger.coverage()["done"] == ledger.coverage()["planned"] == 5
    config = next(iter(ledger.jobs.values())).config
    assert (config["model"], config["task"], config["steps"], config["limit"]) == ("tiny-gpt2", "boolq", 1, 4)


def test_coverage_curve_table_and_verdict_are_shown(finished):
    assert "5 planned, 5 finished, 0 failed" in finished.cover.value
    assert list(finished.pictures) == ["tiny-gpt2 boolq"]
    rows = {(row.sparsity, row.method, row.mode): row for row in finished.seen.rows}
    row = rows[0.5, "random", "sparse_to_sparse"]
    assert f">{row.tuned:.3f}</span>" in finished.tables.value and finished.tables.value.count("<td>") == 2 * 5
    assert "tiny-gpt2 on boolq: " in finished.verdict.value and "1 steps of LoRA" in finished.tables.value
    assert "checked facts hold" in finished.facts.value and "FAILED" not in finished.facts.value


def test_stop_leaves_what_is_done_and_run_does_only_the_rest(tmp_path):
    made = panel(tmp_path)
    heard, inner = made.hear, made.stop_asked.set

    def hear(now) -> None:
        heard(now)
        if now["stage"] == "job started" and now["done"] == 2:
            inner()

    made.hear = hear
    with pytest.raises(Interrupted, match="2 of 5 jobs are done; Run goes on"):
        made.run_now()
    folder = made.place(made.config())
    before = jobs_done(folder)
    assert made.state == "stopped" and len(before) == 2 and "2 finished" in made.cover.value
    assert "missing" in made.tables.value
    made.hear = heard
    made.run_now()
    after = jobs_done(folder)
    assert len(after) == len(set(after)) == 5 and set(before) < set(after)
    assert (
        sum(
            note["event"] == "ended" and note["status"] == "finished"
            for notes in Ledger(folder).notes().values()
            for note in notes
        )
        == 5
    )


def test_after_a_lost_kernel_the_same_cell_goes_on_in_the_same_folder(tmp_path):
    first = panel(tmp_path)
    first.one_cell()
    name = first.config().folder
    again = panel(tmp_path)
    assert again.config().folder == name, "the same settings, and not at its end"
    assert panel(tmp_path, steps=2).config().folder != name, "other settings are another sweep"
    again.run_now()
    assert len(jobs_done(tmp_path / name)) == 5
    assert panel(tmp_path).config().folder != name, "that one is at its end"
    assert unfinished(again.config().plan(), tmp_path) is None


def test_a_changed_form_adds_to_the_folder_and_does_nothing_twice(tmp_path):
    made = panel(tmp_path, methods="unstructured", modes="sparse_to_sparse")
    made.run_now()
    folder = made.place(made.config())
    assert len(jobs_done(folder)) == 2
    made.form.put({"sparsities": "0, 0.5, 0.9"})
    assert made.counts(made.config())["done"] == 2
    made.run_now()
    assert len(jobs_done(folder)) == 3 and made.result["coverage"]["planned"] == 3


def test_a_job_that_fails_is_shown_loudly_and_the_rest_is_done(tmp_path, monkeypatch):
    choose = mask_sets.chosen

    def broken(model, wanted, *rest, **more):
        if wanted.importance == "random":
            raise RuntimeError("no such luck")
        return choose(model, wanted, *rest, **more)

    monkeypatch.setattr(mask_sets, "chosen", broken)
    made = panel(tmp_path, modes="sparse_to_sparse")
    made.run_now()
    assert not made.result["all_facts_hold"] and made.result["coverage"]["failed"] == 1
    assert "FAILED" in made.facts.value and "FAILED" in made.tables.value and "no such luck" in made.told.value
    assert "FAILED every job of the plan came to its end" in notebook.facts(made.result)


def test_a_fact_that_is_false_in_one_run_is_false_in_all(finished, monkeypatch):
    results = type(finished.seen)(finished.seen.folder)
    [path] = [path for path in finished.seen.folder.glob("runs/*/result.json") if path.parent == finished.cell.run_dir]
    kept = path.read_bytes()
    told = records.read_json(path)
    told["facts"][0]["ok"] = told["all_facts_hold"] = False
    records.write_json(path, told)
    try:
        facts = {fact["name"]: fact for fact in results.facts()}
        broken = facts[told["facts"][0]["name"]]
        assert not broken["ok"] and broken["saw"].startswith("4 of 5 runs: unstructured sparsity 0.5")
        assert "A FACT FAILED" in results.table()
    finally:
        path.write_bytes(kept)


def test_while_a_job_runs_its_place_and_the_time_left_are_said(tmp_path):
    made = panel(tmp_path)
    made._timetable = type("Known", (), {"phases": {"jobs": 50.0}, "hear": lambda *_: None})()
    made.hear({"stage": "job started", "job": "a", "name": "random", "done": 2, "total": 5, "seconds_left": None})
    assert made.how_far() == (2 / 5, 30.0), "ten seconds a job by the estimate, nothing of this one done"
    step = {"stage": "training fine_tuned", "step": 1, "steps": 2}
    made.hear(step)
    assert made.how_far() == (2.5 / 5, 25.0)
    assert made.says(step, 1, 2) == "job 3 of 5, random, training fine tuned, 1 of 2"


# earlier sweeps -------------------------------------------------------------------------------------------------------


def test_an_earlier_sweep_puts_its_plan_and_folder_into_the_form(finished):
    again = panel(finished.root, models="tiny-llama", sparsities="0.9")
    [label] = [option for option in again.choice.options if option not in (THIS, NEW)]
    assert finished.seen.folder.name in label and "5 of 5 done" in label
    again.choice.value = label
    assert again.config() == finished.config()
    again._show_estimate()
    assert "5 finished" in again.cover.value and "everything of this plan is done" in again.estimate.value
    assert again.tables.value == finished.tables.value
    again.choice.value = NEW
    assert again.config().folder != finished.config().folder


def test_a_plan_that_no_form_says_is_shown_and_said_how_to_go_on(tmp_path):
    base = {"model": "tiny-gpt2", "task": "boolq", "limit": 4, "tuning": "none", "device": "cpu"}
    sweep.run({"kind": "sparsity", "base": base, "axes": {"sparsity": [0, 0.5]}}, tmp_path / "mine", only=1)
    made = panel(tmp_path)
    made.choice.value = next(option for option in made.choice.options if option.startswith("mine"))
    assert "1 finished" in made.cover.value
    assert f"sweep run PLAN, the file that it was begun with, --out {tmp_path}/mine" in made.choice_note.value
    workers.lay_down(Ledger(tmp_path / "mine").plan, tmp_path / "mine")
    made._chosen()
    words = shlex.split(made.choice_note.value.partition("goes on by ")[2].partition("<")[0])
    assert words[:3] == ["nbhelpers", "sweep", "run"] and Path(words[5]) == tmp_path / "mine"
    assert sweep.run(words[3], words[5], only=1)["planned"] == 2, "the plan that is named is the one of the folder"


def test_a_folder_that_holds_something_else_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "other").mkdir(parents=True)
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds 'letter.txt' but no plan.json"):
        panel(tmp_path, folder="other").run_now()


# elsewhere ------------------------------------------------------------------------------------------------------------


def test_a_plan_becomes_a_form_and_the_form_the_same_plan():
    committed = grid.read_plan(ROOT / "plans" / "sparsity_12.yaml")
    config = from_plan(committed.model_dump(), "x")
    assert list(grid.expand(grid.read_plan(config.plan())).jobs) == list(grid.expand(committed).jobs)
    wide = SweepConfig(models="tiny-gpt2, tiny-opt", tasks="boolq, gsm8k", seeds="0, 1", methods="wanda, random")
    for one in (config, wide.model_copy(update={"sparsities": (0.0, 0.5), "folder": "x", "limit": 5})):
        assert from_plan(grid.read_plan(one.plan()).model_dump(), "x") == one == SweepConfig(**texts(one))


@pytest.mark.parametrize("name", ["sparsity_7b", "sparsity_360"])
def test_a_plan_with_what_no_form_says_is_no_form(name):
    assert from_plan(grid.read_plan(ROOT / "plans" / f"{name}.yaml").model_dump(), "x") is None


def test_the_plan_file_is_the_plan(tmp_path):
    config = SweepConfig(
        models="tiny-gpt2, tiny-opt", methods="nm, wanda", sparsities="0, 0.25", seeds="1, 2", dtype="float32"
    )
    path = write_plan(config, tmp_path)
    assert grid.read_plan(path) == grid.read_plan(config.plan())
    assert yaml.safe_load(path.read_text())["axes"]["model"] == ["tiny-gpt2", "tiny-opt"]


def test_the_commands_shown_name_the_plan_and_the_folder_that_are_there(finished):
    lines = finished.lines(finished.config())
    for name in ("one process", "two processes of this machine", "Ray, on this machine or a cluster"):
        words = shlex.split(lines[name])
        assert words[:3] == ["nbhelpers", "sweep", "run"] and Path(words[3]).is_file()
        assert Path(words[words.index("--out") + 1]).resolve() == finished.seen.folder.resolve()
    assert grid.read_plan(Path(shlex.split(lines["machines that share the folder"])[3])).name == "sparsity of tiny-gpt2"
    assert finished.seen.folder.name in finished.elsewhere() and str(finished.root) not in finished.elsewhere()


@pytest.mark.parametrize(
    "changes", [{}, {"limit": None, "sparsities": "0.5", "more": {"lora_rank": 4, "train_data": None}}]
)
def test_the_papermill_line_shown_makes_the_same_config(changes, tmp_path):
    from test_fine_tuning_panel import parameters_of

    made = panel(tmp_path, **changes)
    names = parameters_of(made.lines(made.config())["papermill"])
    own = {name: names[name] for name in SweepPanel.parameters if name != "folder"}
    assert SweepPanel(root=tmp_path, folder=names["folder"], more=names["more"], **own).config() == made.config()


def test_report_and_masks_are_saved_and_the_archive_holds_them(finished):
    import zipfile

    said = finished.results().save().splitlines()
    assert {"report/report.html", "report/results.csv", "report/columns.json", "report/correctness.md"} <= {*said}
    masks = [line for line in said if line.startswith("report/masks/")]
    assert [line.split("-")[1] for line in masks] == ["magnitude", "random"] and "9 sparsities" in masks[0]
    with zipfile.ZipFile(finished.archive()) as bundle:
        names = set(bundle.namelist())
    assert {"report/report.html", "plan.yaml", "plan.json"} <= names
    assert sum(name.startswith("report/masks/") for name in names) == 2
    assert not any("predictions" in name for name in names), "answers to rows of users stay here"


def test_what_a_mask_file_says_of_itself_leads_to_no_place_outside_the_report(finished, tmp_path, monkeypatch):
    from nbhelpers import mask_files

    shutil.copytree(finished.seen.folder, tmp_path / "s")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    load, which = mask_files.load, iter("ab")

    def foreign(path):
        found = load(path)
        found.header.update(how={"pattern": "../../../" + next(which)}, importance="/../x")
        return found

    monkeypatch.setattr(mask_files, "load", foreign)
    SweepResults(tmp_path / "s").save()
    masks = set(tmp_path.rglob("*.safetensors")) - before
    assert len(masks) == 2 and {path.parent for path in masks} == {tmp_path / "s" / "report" / "masks"}


# the notebook ---------------------------------------------------------------------------------------------------------


def test_the_parameters_of_the_notebook_are_fields_of_its_config_and_papermill_reads_every_one():
    from papermill import inspect_notebook

    found = inspect_notebook(str(NOTEBOOK))
    assert {*found} == {*SweepPanel.parameters, "more"}
    assert all(one["help"] for one in found.values())


def test_jobs_of_a_sweep_are_runs_of_the_notebook_that_made_it(tmp_path, finished):
    runs = finished.root
    found = headless._run_folders(runs, {headless.SWEEP_TAG})
    assert len(found) == 5 and headless._run_folders(runs, set()) == []
    assert headless._unfinished(NOTEBOOK, {headless.SWEEP_TAG}, [read_run(run) for run in found]) is None
    assert "left no finished run" in headless._unfinished(NOTEBOOK, {headless.SWEEP_TAG}, [])


def test_figures_are_shown_one_below_the_other(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "show", shown.append)
    notebook.show_all({"a": plots.Figure(), "b": plots.Figure()})
    assert len(shown) == 2


@pytest.mark.slow
def test_the_notebook_runs_headless_with_other_parameters(tmp_path):
    values = {"models": "tiny-gpt2", "tasks": "boolq", "sparsities": "0.5", "steps": "2", "limit": "8", "seeds": "3"}
    found = headless.run_notebooks(["03_sparse_sweep"], values, tmp_path)
    assert found["all_facts_hold"], found["summary"]
    assert len(found["notebooks"][0]["runs"]) == 4
    [run] = {read_run(path).config["seed"] for path in headless._run_folders(tmp_path / "runs", {headless.SWEEP_TAG})}
    assert run == 3


def test_stop_from_another_thread_is_heard_by_a_click(tmp_path):
    made = panel(tmp_path, steps=100_000, sparsities="0")
    made._run_clicked()
    give_up = time.monotonic() + 120
    while "training" not in made.status.value:
        assert time.monotonic() < give_up, made.error.value
        time.sleep(0.05)
    threading.Thread(target=made.stop).start()
    made.wait(60)
    assert made.state == "stopped" and "0 of 1 jobs are done" in made.status.value
