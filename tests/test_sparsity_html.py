"""Does the page of a sparsity sweep answer first, hold all it needs, escape what others wrote, and hide no hole?"""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from sparsity_grid import MODES, full_grid

from nbhelpers import external_results, records, sparsity_answers, sparsity_html, sparsity_tables

HOLES = {("random", 0.7, MODES[1]), ("structured", 0.4, MODES[1])}
FAILED = {("random", 0.8, MODES[1])}
PICTURES = {"curves-01-tiny-llama-boolq": b"png one", "training_speed": b"png two"}


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data):
        self.words += " ".join(data.split()) + " "


@pytest.fixture(scope="module")
def grid():
    return full_grid(missing=HOLES, failed=FAILED, models=("tiny-llama",), tasks=("boolq", "hellaswag"))


@pytest.fixture(scope="module")
def page(grid, tmp_path_factory):
    return sparsity_html.page(tmp_path_factory.mktemp("none"), grid, pictures=PICTURES)


def test_the_page_is_well_formed_needs_no_network_and_fits_a_phone(page):
    found = Page(page)
    assert found.open == [] or found.open == ["html"], "every tag is closed"
    assert "script" not in {tag for tag, _ in found.tags} and "http" not in page.replace("http-equiv", "")
    assert {values["src"].partition(",")[0] for tag, values in found.tags if tag == "img"} == {"data:image/png;base64"}
    assert all("alt" in values for tag, values in found.tags if tag == "img")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert page.count("<table") == page.count('<div class="wide"><table'), "each table scrolls in its own box"


def test_the_answer_comes_first_then_what_is_covered(page):
    words = Page(page).words
    answer, covered = words.index("So far accuracy stays within 0.02"), words.index("120 cells: 114 done")
    assert answer < covered < words.index("The answers") < words.index("Highest sparsity within 0.02")
    assert "114 done, 2 failed (2 diverged), 4 missing" in words


def test_missing_and_failed_cells_stand_in_the_tables_as_that(page):
    assert page.count('<td class="none">missing</td>') == 4
    assert page.count("<td>diverged: diverged</td>") == 2
    assert "loss is not finite" in Page(page).words, "what failed is listed with its error"


def test_what_others_wrote_is_escaped_everywhere(tmp_path):
    evil = '<script>alert("x")</script>'
    rows = full_grid(models=("tiny-llama",), tasks=("boolq",), methods=("random",), failed={("random", 0.5, MODES[0])})
    changed = {"model": evil, "method": evil, "task": evil, "protocol": evil}
    rows = [row.model_copy(update=changed | ({"error": evil} if row.failure else {})) for row in rows]
    (tmp_path / "x.csv").write_text(f"sparsity,value,protocol\n0.3,0.5,{evil.replace(chr(34), '')}\n")
    compared = external_results.compared(rows, external_results.read(tmp_path / "x.csv"))
    page = sparsity_html.page(tmp_path, rows, pictures={}, compared=compared | {"source": evil})
    assert "<script" not in page and page.count("&lt;script&gt;") > 10
    drawn = sparsity_html.figures(tmp_path, rows)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in drawn), (
        "names of files hold nothing that a path or page takes"
    )


def test_figures_are_drawn_for_each_model_task_and_mode(grid, tmp_path):
    assert list(sparsity_html.figures(tmp_path, grid)) == [
        *("curves-01-tiny-llama-boolq", "map_sparse_to_sparse-01-tiny-llama-boolq"),
        *("map_sparse_to_dense-01-tiny-llama-boolq", "curves-02-tiny-llama-hellaswag"),
        *("map_sparse_to_sparse-02-tiny-llama-hellaswag", "map_sparse_to_dense-02-tiny-llama-hellaswag"),
        "training_speed",
    ]


def run_with_layers(folder, name: str, shares: dict[str, int]) -> None:
    (folder / "runs" / name).mkdir(parents=True)
    layers = [{"name": layer, "numbers": 100, "gone": gone} for layer, gone in shares.items()]
    records.write_json(folder / "runs" / name / "result.json", {"mask": {"per_layer": layers}})


def test_masks_are_drawn_by_layer_where_layers_differ_and_only_there(grid, tmp_path):
    rows = [row for row in grid if row.sparsity in (0.5, 0.9)]
    rows = [row.model_copy(update={"run": f"{row.method}-{row.sparsity}"}) for row in rows]
    run_with_layers(tmp_path, "random-0.5", {"layers.0.a": 50, "layers.1.a": 50})
    run_with_layers(tmp_path, "unstructured-0.5", {"layers.0.a": 80, "layers.1.a": 20})
    run_with_layers(tmp_path, "unstructured-0.9", {"layers.0.a": 99, "layers.1.a": 80})
    drawn = sparsity_html.figures(tmp_path, rows)
    (name,) = (name for name in drawn if name.startswith("layers-"))
    assert name == "layers-01-tiny-llama-unstructured"
    assert "100 of 200 weights go" in drawn[name].get_suptitle(), "at the sparsity nearest to a half"
    page = sparsity_html.page(tmp_path, rows, pictures={name: b"png"})
    assert "differs from layer to layer in 1 of 2 masks" in page


def test_runs_without_counts_by_layer_claim_nothing(page):
    assert "No finished run here has counts by layer." in page


def test_a_users_table_has_its_part_with_both_protocols(grid, tmp_path):
    (tmp_path / "paper.csv").write_text(
        "task,method,sparsity,mode,value\nboolq,random,0.5,s2s,0.1\nboolq,x,0.5,s2s,0.1\n"
    )
    compared = external_results.compared(grid, external_results.read(tmp_path / "paper.csv", None, "5 shots, dev"))
    words = Page(sparsity_html.page(tmp_path, grid, pictures={}, compared=compared)).words
    assert "Beside paper.csv" in words and "how theirs were measured: 5 shots, dev" in words
    assert "tiny-llama boolq random 0.5 sparse to sparse" in words and "outside" in words
    assert "1 of theirs have no partner: line 3" in words
    assert "Beside" not in Page(sparsity_html.page(tmp_path, grid, pictures={})).words


def test_the_lead_takes_the_worst_seed_and_says_when_there_is_nothing_yet(grid, tmp_path):
    def said(rows) -> str:
        return sparsity_tables.lead(rows, sparsity_answers.answers(tmp_path, rows), 0.02)[0]

    one = full_grid(models=("tiny-llama",), tasks=("boolq",), methods=("unstructured",))
    one = [row for row in one if row.sparsity in (0, 0.5) and row.mode == MODES[1]]
    good = [row.model_copy(update={"within_tolerance": True}) for row in one]
    bad = [row.model_copy(update={"within_tolerance": False, "seed": 1}) for row in one]
    kept = "Accuracy stays within 0.02 of the tuned dense model"
    assert said(good) == f"{kept} up to a sparsity of 50 % of the projections' weights, with the best method and mode."
    assert said([*good, *bad]).startswith("No method and mode keeps accuracy within 0.02")
    assert said([row.model_copy(update={"within_tolerance": None}) for row in one]).startswith("No masked cell can be")
    assert said([row.model_copy(update={"tuned": None}) for row in one]) == "No cell is measured yet."


def test_the_levels_name_what_is_not_known(grid, tmp_path):
    names, lines = sparsity_tables.level_table(sparsity_answers.answers(tmp_path, full_grid(tasks=("gsm8k", "boolq"))))
    assert names == ["model", "task", "dense, tuned", "masked at 90 %, before tuning", "chance"]
    assert [line[-1] for line in lines] == ["not known", "0.5"] * 2
    assert lines[1][3].startswith("unstructured 0.") and lines[1][3].count(",") == 2
    planned = [row.model_copy(update={"tuned": None}) for row in grid if row.task == "boolq"]
    _, (line,) = sparsity_tables.level_table(sparsity_answers.answers(tmp_path, planned))
    assert line[2:4] == ["missing", "missing"]


def test_a_page_of_a_sweep_that_trained_nothing_names_no_tuned_model(grid, tmp_path):
    rows = [row.model_copy(update={"tuning": "none", "mode": "untuned"}) for row in grid if row.mode == MODES[1]]
    page = Page(sparsity_html.page(tmp_path, rows, pictures={})).words
    assert "of the dense model, untuned" in page and "dense, untuned" in page
    assert re.findall(r".{20}\b(?:tuned|tuning)\b", page) == []


def test_a_page_says_what_sparsities_are_shares_of_and_the_share_of_weights_beside(grid, page, tmp_path):
    assert "A sparsity is a share of the weights of the covered projections." in Page(page).words
    channels = {"sparsity_of": "MLP channels"}
    rows = [
        row.model_copy(update=channels | {"measured_sparsity": round(row.sparsity * 2 / 3, 4)})
        if row.method == "structured"
        else row
        for row in grid
    ]
    words = Page(sparsity_html.page(tmp_path, rows, pictures={})).words
    assert "or of what goes as a whole (structured: of MLP channels), with the share of weights named beside" in words
    assert "structured, sparse to dense (of MLP channels)" in words and ", 33.3 % of weights" in words
    assert re.search(r"\d0 % of MLP channels \([\d.]+ % of weights\): 0\.", words), "the headline too"
    assert "structured 0.5" in words and "(60 % of weights)" in words, "and the masked model at 90 %"


def test_a_lead_over_shares_of_different_things_counts_them_all_in_weights(tmp_path):
    def lead(rows) -> str:
        return sparsity_tables.lead(rows, sparsity_answers.answers(tmp_path, rows), 0.02)[0]

    rows = [row for row in full_grid(models=("tiny-llama",), tasks=("boolq",)) if row.sparsity in (0, 0.5)]
    rows = [row.model_copy(update={"within_tolerance": row.method == "structured"}) for row in rows]
    channels = {"sparsity_of": "MLP channels"}
    cut = [
        row.model_copy(update=channels | {"measured_sparsity": 1 / 3 if row.sparsity else None})
        for row in rows
        if row.method == "structured"
    ]
    told = "up to a sparsity of 50 % of MLP channels (33.3 % of the projections' weights), with"
    assert told in lead(cut)
    both = [*cut, *(row for row in rows if row.method != "structured")]
    assert "up to a sparsity of 33.3 % of the projections' weights, with" in lead(both)
