"""Does the report of a comparison answer first, hold every number, escape all text, keep dialogues out, fit a phone?"""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import planted_comparison as planted
import pytest
from browser_lab import CHROMIUM, FLAGS, need_browser

from nbhelpers import (
    break_even,
    comparison_html,
    comparison_report,
    comparison_tables,
    dialogues,
    plots_comparison,
    plots_comparison_curves,
    records,
)
from nbhelpers.runs import read_run

EVIL = '<script>alert("x")</script>'
CANARY = "my aunt coughs since Tuesday"
LARGE, SMALL = "LLM_Llama-3.1-8B-Instruct_untrained", "SLM_Llama-3.2-3B-Instruct_finetuned"


class Page(HTMLParser):
    """Tags with their attributes, tables as lists of rows of texts, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words = ""
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data):
        self.words += " ".join(data.split()) + " "
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def page(made=None, manifest=None, texts=None) -> str:
    return comparison_html.page(made or planted.result(), manifest or {}, texts)


@pytest.fixture(scope="module")
def written() -> str:
    return page()


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, where a test is of the words."""
    monkeypatch.setattr(comparison_html, "FIGURES", {})


def test_the_page_is_well_formed_needs_no_network_and_no_script_and_says_what_each_figure_shows(written):
    found = Page(written)
    assert found.open == [] and "script" not in {tag for tag, _ in found.tags} and "http" not in written
    addresses = [values[name] for _, values in found.tags for name in ("src", "srcset") if name in values]
    assert {address.partition(",")[0] for address in addresses} == {"data:image/svg+xml;base64"}
    assert all(values["alt"] for tag, values in found.tags if tag == "img")
    assert len(addresses) == 2 * len(comparison_html.FIGURES), "each for a page and for a phone"
    assert all(base64.b64decode(address.partition(",")[2]).startswith(b"<?xml") for address in addresses)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert written.count("<table") == written.count('<div class="wide"><table'), "each table scrolls in its own box"
    places = {values["href"] for tag, values in found.tags if tag == "a"}
    assert places == {f"#{values['id']}" for _, values in found.tags if "id" in values}


def test_the_answer_with_its_certainty_comes_first_then_the_rest(written):
    words, answer = Page(written).words, planted.result()["answer"]
    gap = answer["difference"]
    certain = f"{100 * gap['mean']:+.1f} points, 95 % interval {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}, p <"
    order = ["Yes ", certain, answer["sentence"][:60], answer["specialisation"]["sentence"][:40]]
    order += ["On rows that this project generated itself", "Research software"]
    order += ["How good is each?", "Three curves", "Paired tests", "What it took", "What went wrong"]
    places = [words.index(part) for part in order]
    assert places == sorted(places) and answer["answer"] == "yes"
    assert "TF-IDF + linear, which needs no language model" in words[: places[4]]


@pytest.mark.parametrize(("answer", "badge"), [("yes", "Yes"), ("no", "No"), ("cannot tell", "Cannot tell")])
def test_the_badge_is_the_answer(answer, badge, undrawn):
    made = planted.result()
    made["answer"]["answer"] = answer
    assert f'<span class="badge">{badge}</span>' in page(made)


def test_every_entry_stands_in_the_table_with_its_numbers_and_none_is_a_dash_never_nought(written):
    made = planted.result()
    table = next(table for table in Page(written).tables if "no valid answer" in table[0])
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert len(rows) == len(made["models"]) == 10
    for entry in made["models"].values():
        row = rows[plots_comparison.full_name(entry)]
        ends = entry["intervals"]["top_1_accuracy"]
        assert (
            row["top-1"] == f"{100 * entry['top_1_accuracy']:.1f} % [{100 * ends['low']:.1f}, {100 * ends['high']:.1f}]"
        )
        assert row["rows"] == "96" and row["precision"] == (entry["precision"] or "-")
        assert row["top-5"] == f"{100 * entry['top_5_accuracy']:.1f} %"
        wrote = entry["no_valid_answer"]
        assert row["no valid answer"] == ("-" if wrote is None else f"{wrote} of 96")
    assert rows["TF-IDF + linear"]["exact match (written)"] == "-"


def test_labels_that_are_no_codes_have_no_category_and_no_chapter(undrawn):
    made = planted.result()
    made["data"]["kind"] = "labels"
    tables = [table[0] for table in Page(page(made)).tables]
    assert not any("category" in names or "chapter" in names for names in tables)


def test_speed_memory_and_waiting_stand_beside_each_model(written):
    table = next(table for table in Page(written).tables if "p99" in table[0])
    row = dict(zip(table[0], table[1], strict=True))
    assert row["peak memory"] == "5.76 GB (GPU)" and row["weights"] == "5.08 GB" and row["parameters"] == "8.03B"
    assert (row["p50"], row["p95"], row["p99"]) == ("0.420 s", "0.588 s", "0.798 s") and row["prompts cut"] == "2"
    assert len(table) == 1 + 6, "what needs no language model is not in it"


def test_licence_and_gate_of_each_model_stand_beside_it_and_nothing_in_older_results():
    found = {"a/b-3B": {"licence": "llama3.2", "gated": True}, "tiny": {"licence": "mit", "gated": False}}
    found |= {"folder/mine": {"licence": "unknown", "gated": None}}
    assert comparison_tables.licences({"licences": found})[1] == [
        ["b-3B", "llama3.2", "asks for consent on its hub page"],
        ["tiny", "mit", "none"],
        ["mine", "unknown", "unknown"],
    ]
    assert comparison_tables.licences({})[1] == []


def test_where_answers_came_from_is_what_the_run_says_not_what_is_kept_with_them():
    result = planted.result()
    key = next(key for key in result["models"] if key.startswith("LLM_"))
    result["phases"] = [{"model": key, "came": "cached", "name": "llm_evaluation", "seconds": 1.0}]
    came = {line[0]: line[-1] for line in comparison_tables.effort(result)[1]}
    assert came[comparison_tables.full_name(result["models"][key])] == "the cache"
    assert "this run" in came.values(), "no word of the run: what stands with the answers"


def test_paired_tests_are_those_of_the_answer_and_all_pairs_with_holms_correction(written):
    made = planted.result()
    decisive, everything = (table for table in Page(written).tables if "p (Holm)" in table[0])
    assert len(decisive) == 1 + 4 and len(everything) == 1 + 45
    test = made["answer"]["tests"][0]
    assert decisive[1][0] == "Llama-3.2-3B-Instruct (fine-tuned) against Llama-3.1-8B-Instruct (not fine-tuned)"
    assert decisive[1][2:4] == [str(test["only_a"]), str(test["only_b"])]
    assert decisive[1][1].startswith(f"{100 * test['difference']['mean']:+.1f} [")


def test_each_of_the_three_curves_has_its_sentence(written):
    made, words = planted.result(), Page(written).words
    assert made["break_even"]["sentence"] in words
    for point in made["routing"][SMALL]["points"]:
        assert f"To be right on {point['wanted']:.0%}: {point['says']}." in words
    pays = made["cost"]["pays"][0]["sentence"]
    assert pays in words or comparison_html._with_names(pays, made) in words
    assert not re.search(r"\b[LS]LM_", words), "no key where a name belongs"


def test_the_break_even_curve_says_the_labels_it_leaves_out_where_the_result_does():
    older = planted.result()
    made = older | {"break_even": break_even.with_uncounted(older["break_even"], 64)}
    axes = [plots_comparison_curves.break_even(one).axes[0].get_xlabel() for one in (older, made)]
    assert axes[0] == "labelled dialogues it was tuned on"
    assert axes[1] == f"{axes[0]}\n(plus 64 that chose each tuning's best step)"
    assert "Plus 64 validation dialogues" not in Page(page(older)).words
    assert "Plus 64 validation dialogues, which chose each tuning's best step." in Page(page(made)).words


def test_what_a_run_does_not_have_is_said_in_a_line_and_not_drawn(tmp_path):
    made = planted.without("SLM_", "ENSEMBLE_") | {"experiment": "baseline", "verdict": "Only the large side."}
    words, text = Page(page(made)).words, page(made)
    assert 'class="badge"' not in text and "Only one side was evaluated" in words
    assert "Not drawn: no small model was tuned on parts of the rows" in words
    assert "Not drawn: no model ranked the labels of validation and test rows" in words
    assert "there is nothing to test between the sides" in words and "No model was tuned." in words
    assert "No price was named: this is time" in words
    made = planted.without("BASELINE_") | {"experiment": "full"}
    assert "No baseline was fitted: whether a language model is needed at all is not known." in Page(page(made)).words


def test_a_failed_check_is_said_at_the_top_and_stands_in_red(undrawn):
    made = planted.result()
    assert "FAILED" not in page(made) and page(made).count("holds: ") == 2
    made["facts"][1] |= {"ok": False, "saw": "3 exact, 0 near", "model": SMALL}
    words = Page(page(made)).words
    assert words.index("1 of 2 checks FAILED") < words.index("How good is each?")
    failed = "FAILED: no row is on both sides of the split Llama-3.2-3B-Instruct (fine-tuned): 3 exact"
    assert failed in words and words.index(failed) < words.index("holds: ")
    assert '<li class="failed">FAILED' in page(made)


def test_a_claim_that_was_checked_of_several_models_stands_once(undrawn):
    made = planted.result()
    made["facts"] = [made["facts"][0] | {"model": key, "saw": f"of {key[:3]}"} for key in (LARGE, SMALL)]
    words = Page(page(made)).words
    assert words.count("the training prefix equals the prompt") == 1
    assert f"{'Llama-3.1-8B-Instruct (not fine-tuned)'}: of LLM" in words


def test_the_record_is_in_words_and_only_the_projects_own_prompt_stands_in_it(undrawn):
    made = planted.result()
    made["data"]["cleaning"] = {"rows": 9, "kept": 8, "duplicate": {"rows": 1, "places": ["row 3"]}, "says": ["1 gone"]}
    made["data"]["cleaning"] |= {"columns": {"dialogue": "Talk"}, "unreadable": {"rows": 0, "places": []}}
    made["data"]["split"] = {
        "mode": "per_label",
        "rows": {"train": 6},
        "labels": {"train": 2},
        "sha256": {"train": "f00d"},
    }
    manifest = {
        "config": {"system_prompt": ""},
        "environment": {"cpu": {"ram_bytes": 2**31}, "libs": {"torch": "2.13"}},
    }
    words = Page(page(made, manifest)).words
    for said in (
        "9 rows were read and 8 kept",
        "1 gone.",
        "left out: repeats a dialogue and its label 1",
        "column of the dialogue Talk",
        "how each label in every part",
        "rows to train on f00d",
        "memory 2 GB",
        "torch 2.13",
        made["protocol"]["system_prompt"],
    ):
        assert said in words, said
    assert "cannot be read" not in words, "nothing was"
    assert made["protocol"]["system_prompt"] not in Page(page(made, {"config": {"system_prompt": CANARY}})).words


def test_what_no_threshold_promises_is_said_in_one_sentence_and_marks_nothing(undrawn):
    made = planted.result()
    for point in made["routing"][SMALL]["points"]:
        says = f"no threshold promises {point['wanted']:.0%} on the 9 validation documents: all go to a person"
        point |= {"test": None, "threshold": None, "says": says}
    words = Page(page(made)).words
    assert "To be right on 80%, 90% or 95%: no threshold promises as much on the 9 validation documents" in words
    assert words.count("no threshold promises") == 1


def test_the_stamp_is_there_exactly_where_rows_are_generated(undrawn):
    made = planted.result()
    made["data"]["generated"] = False
    assert "this project generated" in page() and "this project generated" not in page(made)


def evil(value):
    """The same record with EVIL in every text that can come from outside."""
    if isinstance(value, dict):
        return {key: evil(one) for key, one in value.items()}
    if isinstance(value, list):
        return [evil(one) for one in value]
    return EVIL + value if isinstance(value, str) else value


def test_what_others_wrote_is_escaped_everywhere():
    made = planted.result()
    for key in ("facts", "notice", "verdict", "protocol", "budget"):
        made[key] = evil(made[key] or {"text": "x"})
    made["data"] |= {"source": EVIL, "cleaning": {EVIL: [EVIL]}, "split": evil(made["data"]["split"])}
    made["break_even"]["sentence"] = made["cost"]["measured_on"] = EVIL
    for entry in made["models"].values():
        entry["model"] = EVIL + entry["model"]
        entry["precision"] = EVIL
        entry["errors"] = [{"id": EVIL, "gold": [EVIL], "said": EVIL}]
        for part, field in (("by_chapter", "chapter"), ("by_frequency", "training_rows")):
            entry[part] = [one | {field: EVIL + one[field]} for one in entry[part]]
    manifest = {"config": {"name": EVIL}, "fingerprints": {EVIL: EVIL}, "environment": {"python": EVIL}}
    text = page(made, manifest, {EVIL: EVIL})
    assert "<script" not in text and text.count("&lt;script&gt;") > 60
    Page(text)


def test_no_dialogue_and_no_name_of_this_machine_stand_in_the_report(tmp_path, undrawn):
    made = planted.result()
    made["data"]["source"] = "/volume/someone/secret folder/rows.csv"
    folder = planted.run(tmp_path / "run", made, system_prompt=CANARY, data="/volume/someone/secret folder/rows.csv")
    manifest = records.read_json(folder / "manifest.json")
    manifest["environment"] = {"host": "ward-7", "python": "3.11.7", "libs": {"torch": "2.13"}}
    records.write_json(folder / "manifest.json", manifest)
    text = comparison_report.write(folder).read_text()
    assert CANARY not in text and "sha256:" in text and "ward-7" not in text
    assert "someone" not in text and "rows.csv" in text and "3.11.7" in text


def with_texts(tmp_path, **config):
    """A run over a file of dialogues, two of them answered wrongly by every model."""
    rows = [{"id": f"r{n}", "dialogue": f"{EVIL} {CANARY} {n} {'cough ' * n}", "label": "ab"[n % 2]} for n in range(8)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, read = planted.result(), dialogues.read(source)
    made["data"]["sha256"] = read.sha256
    for entry in made["models"].values():
        entry["errors"] = [{"id": row.id, "gold": list(row.labels), "said": None} for row in read.rows[:2]]
    return planted.run(tmp_path / "run", made, **config | {"data": str(source)}), source


def test_dialogues_stand_beside_the_errors_only_of_a_run_that_keeps_text_and_escaped(tmp_path, undrawn):
    folder, _ = with_texts(tmp_path, keep_text=True)
    text = comparison_report.write(folder).read_text()
    assert f"&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; {CANARY} 1" in text
    assert "<script" not in text and "keep_text" in text


def test_without_keep_text_no_report_reads_the_data_at_all(tmp_path, undrawn):
    folder, source = with_texts(tmp_path)
    source.unlink()
    text = comparison_report.write(folder).read_text()
    assert CANARY not in text and "no dialogue is shown" in text and "no valid answer" in text


def test_texts_of_data_that_changed_since_are_refused(tmp_path, undrawn):
    folder, source = with_texts(tmp_path, keep_text=True)
    source.write_text(source.read_text().replace("cough", "pain"))
    with pytest.raises(ValueError, match="has changed since the run: put the file back"):
        comparison_report.write(folder)


def test_the_report_is_written_into_the_run_and_another_kind_or_an_unfinished_run_is_refused(tmp_path, undrawn):
    folder = planted.run(tmp_path / "run")
    assert comparison_report.write(folder) == folder / "report.html"
    assert read_run(folder).status == "finished"
    with pytest.raises(ValueError, match="is not a run directory"):
        comparison_report.write(tmp_path)
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match=r"has no result \(interrupted\)"):
        comparison_report.write(folder)
    manifest = records.read_json(folder / "manifest.json")
    records.write_json(folder / "manifest.json", manifest | {"kind": "pruning"})
    with pytest.raises(ValueError, match="of kind 'pruning', this report is of 'comparison'"):
        comparison_report.write(folder)


def test_the_markdown_table_has_a_row_an_entry_and_no_name_ends_a_cell_or_begins_a_tag():
    made = planted.result()
    made["models"][LARGE]["model"] = "a|b<script>"
    lines = comparison_report.markdown_table(made).splitlines()
    assert len(lines) == 2 + 10 and {line.count("|") for line in lines} == {9}
    assert lines[0].startswith("| model | precision | top-1 accuracy | top-5 | F1 (macro) | no valid answer |")
    assert any("a/b&lt;script>" in line for line in lines) and "<" not in "".join(lines)
    assert any("| 84.4 % [76.0, " in line for line in lines)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": {"b": 1, "c": None}}, [["a: b", "1"]]),
        ({"places": list(range(20))}, [["places", "0; 1; 2; 3; 4; 5; 6; 7, ... (20 in all)"]]),
        ({"learning_rate": 2e-4, "keep_text": False}, [["learning rate", "0.0002"], ["keep text", "no"]]),
        (
            {"llm_models": [{"name": "m", "size": "", "load_in_4bit": True}]},
            [["llm models", "m (load in 4bit)"]],
        ),
        ({"empty": [], "none": {}, "blank": ""}, []),
        ({"ram_bytes": 3 * 2**29, "steps": 3}, [["ram bytes", "1.5 GB"], ["steps", "3"]]),
    ],
)
def test_a_record_reads_as_lines_without_what_was_not_set(value, said):
    assert comparison_tables.settings(value)[1] == said


@pytest.fixture(scope="module")
def browser():
    need_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 800, 1200])
def test_in_a_browser_nothing_is_wider_than_the_page_and_every_figure_is_there_and_readable(
    browser, width, written, tmp_path
):
    path = tmp_path / "report.html"
    path.write_text(written)
    tab = browser.new_page(viewport={"width": width, "height": 844})
    tab.set_default_timeout(120_000)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    figures = tab.evaluate("[...document.images].map(one => [one.naturalWidth, one.getBoundingClientRect().width])")
    wanted = plots_comparison.NARROW if width == 390 else plots_comparison.WIDE
    assert [round(natural) for natural, _ in figures] == [round(96 * wanted)] * len(figures), "96 pixels an inch"
    letter = min(shown / wanted for _, shown in figures) * 8.5 / 72
    assert letter >= 9.5, "the smallest letters, in pixels"
    boxes = tab.evaluate("[...document.querySelectorAll('.wide')].map(one => one.getBoundingClientRect().right)")
    assert max(boxes) <= width and not [url for url in asked if not url.startswith(("file:", "data:"))]
    tab.close()
