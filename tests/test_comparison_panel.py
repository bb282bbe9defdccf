"""Does the panel of a comparison say what it takes, show answers as they come, load nothing twice, and go on?"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import planted_comparison
import pytest
from pydantic import ValidationError
from test_fine_tuning_panel import parameters_of
from typer.testing import CliRunner

from nbhelpers import (
    catalogue,
    cli,
    comparison_before,
    comparison_live,
    comparison_said,
    headless,
    memory,
    models,
    records,
)
from nbhelpers.comparison import Comparison
from nbhelpers.comparison_config import ComparisonConfig
from nbhelpers.comparison_form import ComparisonForm, form_of, from_record, plain_config, texts, twin
from nbhelpers.comparison_live import Live
from nbhelpers.comparison_panel import NEW, ComparisonPanel
from nbhelpers.runs import read_run
from nbhelpers.tracking import Interrupted

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "04_llm_vs_slm.ipynb"
LABELS = {"DIET": "eat less salt", "SLEEP": "sleep eight hours", "WALK": "walk every day", "DRINK": "drink more water"}
SECRET = "hf_nobody_must_see_this"


@pytest.fixture(scope="session")
def talks(tmp_path_factory) -> Path:
    """Ten dialogues of each of four labels, in a user's file with columns of the user's own."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [
        {
            "what was said": f"Doctor: On day {day} we talk. Patient: What shall I do? Doctor: You {said}.",
            "topic": label,
        }
        for label, said in LABELS.items()
        for day in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def panel(root: Path, talks: Path, **changes) -> ComparisonPanel:
    values = {
        "data": str(talks),
        "dialogue_column": "what was said",
        "label_column": "topic",
        "llm_models": "tiny-llama",
        "slm_models": "tiny-gpt2",
        "method": "full",
        "epochs": 1,
        "break_even_points": 0,
        "more": {"latency_requests": 1, "new_tokens": 4, "device": "cpu"},
    }
    made = ComparisonPanel(root=root, **values | changes)
    made._estimator.cancel()  # a test asks for it itself
    return made


@pytest.fixture(scope="module")
def finished(talks, tmp_path_factory):
    """A panel whose run is over; its pictures on the way are counted."""
    made = panel(tmp_path_factory.mktemp("panel") / "runs", talks)
    made.on_the_way, heard = [], made.hear

    def hear(now) -> None:
        heard(now)
        made.on_the_way.append((now, made.seen.says(), made.seen.table()))

    made.hear = hear
    made._run_clicked()
    made.wait(300)
    made.hear = heard
    return made


# before ---------------------------------------------------------------------------------------------------------------


def test_what_was_found_and_how_it_is_split_is_said_beforehand(tmp_path, talks):
    made = panel(tmp_path, talks)
    made._show_estimate()
    for number, what in ((40, "dialogues"), (4, "labels"), (24, "to tune on"), (8, "to choose by"), (8, "to test on")):
        assert f"<b>{number}</b>{what}" in made.before.value
    assert "DIET, DRINK, SLEEP, WALK." in made.before.value
    assert "about " in made.estimate.value and "estimated from this device" in made.estimate.value


def test_the_smallest_difference_is_that_of_two_independent_models(tmp_path, talks):
    made = panel(tmp_path, talks)
    made._show_estimate()
    assert comparison_before.detectable(8) is None and "8 test dialogues can tell no difference" in made.before.value
    assert 0.13 < comparison_before.detectable(200) < 0.15, "(1.96 + 0.84) * sqrt(0.5 / 200) = 0.14"
    assert 0.16 < comparison_before.detectable(200, pairs=4) < 0.17, "(2.50 + 0.84) * sqrt(0.5 / 200) = 0.167"


def test_a_file_that_cannot_be_read_is_said_before_run(tmp_path, talks):
    made = panel(tmp_path, talks, label_column="theme")
    made._show_estimate()
    assert "got &#39;theme&#39;; it has &#39;what was said&#39;, &#39;topic&#39;" in made.before.value


def test_columns_are_asked_for_where_the_data_are_a_file_of_ones_own(tmp_path, talks):
    made = panel(tmp_path, talks)
    boxes = [made.form.controls[name].box for name in ("dialogue_column", "label_column")]
    assert all(box.layout.display != "none" for box in boxes)
    made.form.put({"dialogue_column": None, "label_column": None, "data": "bundled"})
    assert all(box.layout.display == "none" for box in boxes)


def test_rows_of_the_hub_are_not_fetched_before_run(tmp_path, talks, monkeypatch):
    monkeypatch.setattr(comparison_before.dialogues, "read", lambda *_: pytest.fail("looked at the hub"))
    made = panel(tmp_path, talks, data="owner/dialogues", dialogue_column=None, label_column=None)
    made._show_estimate()
    assert "owner/dialogues: its rows are read from the hub when Run is pressed" in made.before.value


def test_the_form_says_not_fine_tuned_where_results_say_untrained(tmp_path, talks):
    made = panel(tmp_path, talks)
    for side in ("llm_models", "slm_models"):
        assert "not fine-tuned (zero-shot)" in made.form.controls[side].box.children[0].value
    assert "large, not fine-tuned (zero-shot)" in made.said_before()


def test_ticks_name_models_and_4_bits_hold_for_their_side_alone(tmp_path, talks):
    made = panel(tmp_path, talks, llm_models="tiny-llama, owner/large")
    boxes = {box.description: box for box in made.form.controls["llm_models"].parts[1:]}
    assert {"small-llama", *(model.name for model in catalogue.offered("llm"))} == {*boxes}
    boxes["small-llama"].value = True
    made.form.put({"llm_4bit": True})
    config = made.config()
    assert type(config) is ComparisonConfig
    found = [(model.name, model.load_in_4bit) for model in (*config.llm_models, *config.slm_models)]
    assert found == [("small-llama", True), ("tiny-llama", True), ("owner/large", True), ("tiny-gpt2", False)]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("budget", "soon", "a time such as 90m or 2h, got"),
        ("shots", 21, None),
        ("baselines", "majority, oracle", "unknown baseline"),
        ("learning_rate", "much", "must be a valid number"),
    ],
)
def test_a_value_that_makes_no_sense_is_said_beside_it(field, value, said, tmp_path, talks):
    made = panel(tmp_path, talks)
    if said is None:  # a slider has no such value
        assert made.form.controls[field].parts[0].max < value
        return
    made.form.put({field: value})
    assert said in made.form.controls[field].refusal.value and made.run_button.disabled
    with pytest.raises(ValidationError, match=field):
        made.run_now()


def test_what_is_wrong_with_the_whole_is_said_below_the_form(tmp_path, talks):
    made = panel(tmp_path, talks)
    made.form.put({"llm_models": ""})
    assert "llm_models must name at least one model" in made.whole.value and made.run_button.disabled
    made.form.put({"llm_models": "tiny-llama"})
    assert made.whole.value == "" and not made.run_button.disabled


def test_an_unknown_field_is_refused_by_its_name(tmp_path, talks):
    with pytest.raises(ValidationError, match="unknown field 'lora_ranks'. Did you mean 'lora_rank'"):
        panel(tmp_path, talks, more={"lora_ranks": 4})


def test_memory_is_set_beside_what_is_free_and_download_licence_and_gate_are_named(tmp_path, talks, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 9 * 10**9)
    made = panel(tmp_path, talks, llm_models="Llama-3.1-8B-Instruct, tiny-llama", more={"device": "cuda"})
    made._show_estimate()
    large, small, tuned = made_rows = comparison_before.needs(made.config())
    assert large["bytes"] > 2 * 8.03e9 and not large["fits"] and small["fits"] and tuned["job"] == "answers, tuning"
    assert "✗ too large" in made.needed.value and made.needed.value.count("✓ fits") == 2
    assert f"{large['download'] / 1e9:.1f} GB to download" in made.needed.value
    assert "licence llama3.1; gated" in made.needed.value and len(made_rows) == 3
    made.form.put({"llm_4bit": True})
    assert comparison_before.needs(made.config())[0]["bytes"] < large["bytes"] / 2


def test_memory_of_tuning_is_that_of_one_micro_batch(tmp_path, talks):
    def tuned(**more) -> int:
        made = panel(tmp_path, talks, more={"device": "cuda", "window": 512, **more})
        return comparison_before.needs(made.config())[1]["bytes"]

    assert tuned(batch_size=16, micro_batch_size=1) == tuned(batch_size=1) < tuned(batch_size=16)


def test_a_gated_model_without_a_token_offers_the_open_set(tmp_path, talks, monkeypatch):
    monkeypatch.setattr(catalogue, "token_state", lambda: "absent")
    made = panel(tmp_path, talks, llm_models="Llama-3.1-8B-Instruct")
    made._show_estimate()
    assert made.open_box.layout.display == "" and "Llama-3.1-8B-Instruct: gated, and no token" in made.open_note.value
    made._open_clicked()
    chosen = [model.name for model in (*made.config().llm_models, *made.config().slm_models)]
    assert chosen and all(catalogue.entry(name).gated is False for name in chosen)
    assert all(catalogue.entry(name).licence in catalogue.COMMERCIAL for name in chosen)
    made._show_estimate()
    assert made.open_box.layout.display == "none"


def test_with_a_token_nothing_is_offered_and_the_token_stands_nowhere(tmp_path, talks, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    made = panel(tmp_path, talks, llm_models="Llama-3.1-8B-Instruct")
    made._show_estimate()
    assert made.open_box.layout.display == "none"
    values = [str(widget.value) for widget in below(made.box) if hasattr(widget, "value")]
    assert len(values) > 30 and not any(SECRET in value for value in values)
    assert SECRET not in json.dumps(made.lines(made.config()))


def below(widget) -> list:
    return [widget, *(one for child in getattr(widget, "children", ()) for one in below(child))]


def test_every_model_that_has_a_short_name_is_listed_with_its_licence(tmp_path, talks):
    page = comparison_before.catalogue_table()
    for model in map(catalogue.entry, catalogue.names()):
        assert f"<td>{model.name}</td>" in page and f"<td>{model.licence}</td>" in page
    assert all(f"<td>{name}</td>" in page for name in models.bundled_names())


# the run --------------------------------------------------------------------------------------------------------------


def test_the_verdict_stands_first_then_every_entry_with_its_accuracy(finished):
    assert finished.state == "finished", finished.error.value
    result = finished.result
    assert finished.verdict.value.index(result["verdict"][:40]) < 60
    for entry in result["models"].values():
        assert f">{100 * entry['top_1_accuracy']:.1f} %</td>" in finished.tables.value
    assert finished.tables.value.count("nbh-barcell") == len(result["models"]) == 6
    assert list(finished.pictures)[:2] == ["accuracy", "size"]
    assert "checked facts hold" in finished.facts.value and "FAILED" not in finished.facts.value


def test_what_is_recorded_is_what_the_form_said(finished, talks):
    run = read_run(finished.result["run_dir"])
    assert from_record(run.config) == finished.config()
    assert (run.config["data"], run.config["label_column"], run.config["epochs"]) == (str(talks), "topic", 1)


def test_while_it_runs_the_model_at_work_and_what_it_got_right_is_said(finished):
    said = [text for _, text, _ in finished.on_the_way]
    assert "tiny-llama (not fine-tuned): loading" in said
    assert any(text.startswith("tiny-gpt2 (fine-tuned): tuning, step ") for text in said)
    answers = finished.result["models"]["SLM_tiny-gpt2_finetuned"]
    right = round(answers["top_1_accuracy"] * answers["n_samples"])
    assert f"tiny-gpt2 (fine-tuned): answered, {right} of 8 right" in said
    tables = [table for now, _, table in finished.on_the_way if now["stage"] == "answering"]
    assert "waiting" in tables[0] and "answer 1 of 16" in tables[0]


def test_the_report_is_beside_the_run_and_in_the_link(finished):
    import base64

    page = (Path(finished.result["run_dir"]) / "report.html").read_bytes()
    assert base64.b64encode(page).decode() in finished.report_link.value and b"<h1>" in page


def test_a_second_run_loads_no_model_says_so_and_finds_the_same(finished, talks, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    again = panel(finished.root, talks)
    again._show_estimate()
    assert "answers are taken from" in again.estimate.value
    assert twin(again.config().model_copy(update={"epochs": 2}), list(again.earlier.values())) is None
    again.run_now()
    assert "taken from before" in again.tables.value
    first, second = (records.read_json(f"{one.result['run_dir']}/results.json") for one in (finished, again))
    assert first.keys() == second.keys()
    for key in first:
        assert first[key]["top_1_accuracy"] == second[key]["top_1_accuracy"]
        assert first[key]["macro_f1"] == second[key]["macro_f1"]


def test_a_model_whose_name_is_html_shows_as_text(tmp_path, talks):
    (tmp_path / "<b>x").symlink_to(models.locate("tiny-llama")[1])
    made = panel(tmp_path, talks, llm_models=str(tmp_path / "<b>x"))
    made._show_estimate()
    assert "<b>x" not in made.needed.value and "&lt;b&gt;x" in made.needed.value
    assert "<b>x" not in Live(made.config(), False).table()


# stop and go on -------------------------------------------------------------------------------------------------------


def stopped(root: Path, talks: Path) -> Path:
    """The folder of a run that was stopped while it tuned."""
    quick = {"latency_requests": 1, "answers": "ranking", "baselines": "majority", "device": "cpu"}
    made = panel(root, talks, more=quick)
    heard = made.hear

    def hear(now) -> None:
        heard(now)
        if now["stage"] == "tuning":
            made.stop_asked.set()

    made.hear = hear
    with pytest.raises(Interrupted, match="stopped in step"):
        made.run_now()
    assert made.state == "stopped" and "not at the end" in made.choice_note.value
    return next(path.parent for path in root.glob("*/manifest.json"))


def test_a_stopped_run_is_offered_and_goes_on_in_its_own_folder(talks, tmp_path):
    folder = stopped(tmp_path, talks)
    again = panel(tmp_path, talks, epochs=3, resume="newest")
    assert again.config().epochs == 1, "its own settings count"
    assert again.run_button.description == "Go on" and again.form.controls["epochs"].parts[0].disabled
    result = again.run_now()
    assert Path(result["run_dir"]) == folder and read_run(folder).status == "finished"
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1 and again.choice.value == NEW
    assert f"--out {folder} --resume" in again.equivalent.value and f"-p resume {folder}" in again.equivalent.value


def test_what_cannot_be_gone_on_with_is_refused_by_name(finished, talks, tmp_path):
    with pytest.raises(LookupError, match="no interrupted comparison is here"):
        panel(tmp_path, talks, resume="newest")
    folder = stopped(tmp_path, talks)
    with pytest.raises(LookupError, match=f"Available: {folder.name}"):
        panel(tmp_path, talks, resume="another")


def test_an_earlier_run_is_shown_and_its_settings_stand_in_the_form(finished, talks):
    again = panel(finished.root, talks, epochs=7, llm_models="small-llama")
    run = next(label for label in again.choice.options if Path(finished.result["run_dir"]).name in label)
    again.choice.value = run
    assert again.config() == finished.config()
    assert again.tables.value == finished.tables.value and again.verdict.value == finished.verdict.value
    assert again.resumed is None and twin(again.config(), list(again.earlier.values())) is not None


# so far ---------------------------------------------------------------------------------------------------------------


def live() -> Live:
    return Live(ComparisonConfig(llm_models="small-llama", slm_models="tiny-gpt2", baselines="majority"), True)


def test_the_share_that_is_done_is_weighted_with_the_expected_seconds():
    seen = live()
    seconds = {"LLM_small-llama_untrained": 10.0, "SLM_tiny-gpt2_zero_shot": 10.0, "SLM_tiny-gpt2_finetuned": 20.0}
    assert seen.fraction(seconds) == 0.0
    about = {"key": "LLM_small-llama_untrained", "part": "test", "total": 40}
    seen.hear({"stage": "answering", "done": 20} | about)
    assert seen.fraction(seconds) == 5 / 40
    seen.hear({"stage": "answered", "right": 3, "came": "measured"} | about)
    seen.hear({"stage": "answered", "key": "SLM_tiny-gpt2_zero_shot", "right": 3, "total": 40, "came": "cached"})
    step = {"stage": "tuning", "key": "SLM_tiny-gpt2_finetuned", "step": 5, "steps": 10, "train_loss": 2.0}
    seen.hear(step | {"validation_nll": None})
    assert seen.fraction(seconds) == pytest.approx((20 + 20 * 0.7 / 2) / 40)
    assert seen.says() == "tiny-gpt2 (fine-tuned): tuning, step 5 of 10"
    seen.hear({"stage": "answering", "key": "SLM_tiny-gpt2_finetuned", "part": "test", "done": 1, "total": 4})
    assert seen.fraction(seconds) == pytest.approx((20 + 20 * (0.7 + 0.3 / 4)) / 40)


def test_accuracy_so_far_has_the_exact_interval_of_what_was_asked_so_far():
    seen = live()
    seen.hear({"stage": "answering", "key": "LLM_small-llama_untrained", "part": "test", "done": 9, "total": 40}
              | {"right": 0, "asked": 9})  # fmt: skip
    entry = seen.result()["models"]["LLM_small-llama_untrained"]
    assert entry["top_1_accuracy"] == 0.0
    assert entry["intervals"]["top_1_accuracy"]["high"] == pytest.approx(1 - 0.025 ** (1 / 9))
    assert "0 of 9 right so far" in seen.says() and "0.0 %" in seen.table()
    assert set(seen.figures()) == {"accuracy"} and seen.figures() == {}, "drawn again only where there is more"


def test_a_training_on_fewer_dialogues_has_a_row_of_its_own_and_ends_when_the_next_begins():
    seen = live()
    seen.hear({"stage": "answering", "key": "SLM_tiny-gpt2_on_24", "part": "test", "done": 3, "total": 8})
    assert comparison_live.FEWER in seen.table() and "tiny-gpt2, tuned on 24 dialogues" in seen.table()
    seen.hear({"stage": "loading", "key": "SLM_tiny-gpt2_on_48"})
    assert seen.states["SLM_tiny-gpt2_on_24"]["doing"] == "answered"


def test_the_interim_verdict_is_shown_until_the_last_word(finished, talks, tmp_path):
    made = panel(tmp_path, talks)
    made.forget(made.config())
    made.hear({"stage": "answering", "key": "SLM_tiny-gpt2_finetuned", "part": "test", "done": 1, "total": 2}
              | {"interim": "So far, after 20 of 40 <test> documents: yes."})  # fmt: skip
    made._draw()
    assert "So far, after 20 of 40 &lt;test&gt; documents: yes." in made.interim.value
    assert finished.interim.value == ""


# in words -------------------------------------------------------------------------------------------------------------


def test_decisions_name_what_was_not_trained_with_its_number_and_what_was_with_yes_or_no():
    result = planted_comparison.result()
    lines = dict(line.rsplit("  ", 1) for line in comparison_said.decisions(result).splitlines())
    lines = {name.strip(): said.strip() for name, said in lines.items()}
    large = result["models"]["LLM_Llama-3.1-8B-Instruct_untrained"]["top_1_accuracy"]
    assert lines["Llama-3.1-8B-Instruct (not fine-tuned)"] == f"{100 * large:.1f} %"
    assert lines["tuning raised Llama-3.2-3B-Instruct"] == "True"
    assert lines["did specialisation beat size?"] == result["answer"]["answer"] == "yes"
    assert "(fine-tuned)" not in comparison_said.decisions(result).replace("(not fine-tuned)", "")


def test_a_fact_that_fails_of_one_model_fails_and_says_of_which():
    same = {"name": "a", "says": "it holds", "saw": "0 apart"}
    facts = [same | {"ok": True, "model": "LLM_x_untrained"}, same | {"ok": False, "model": "SLM_y_finetuned"}]
    [found] = comparison_said.grouped_facts({"facts": facts})
    assert not found["ok"] and found["saw"] == "y (fine-tuned): 0 apart"
    [found] = comparison_said.grouped_facts({"facts": [facts[0], facts[0]]})
    assert found["ok"] and found["saw"] == "of 2 models and states"


def test_a_curve_that_was_not_measured_is_named_with_its_reason():
    result = planted_comparison.result() | {"break_even": None}
    assert "break_even" not in comparison_said.curves(result)
    assert comparison_said.not_drawn(result).startswith("break-even: no small model was tuned on parts")


# elsewhere ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llm_4bit": True, "budget": "90m", "price_per_hour": 1.5, "more": {"lora_rank": 4, "keep_text": True}},
        {"learning_rate": None, "ensemble": True, "more": {"baselines": "majority", "cache": False, "device": None}},
    ],
)
def test_the_lines_shown_make_the_same_config(changes, tmp_path, talks, monkeypatch):
    made = panel(tmp_path, talks, **changes)
    lines, seen = made.lines(made.config()), {}
    names = parameters_of(lines["papermill"])
    own = {name: names[name] for name in ComparisonPanel.parameters}
    assert ComparisonForm(**own, **names["more"]).comparison() == made.config()

    names = {}
    exec(lines["Python"].rpartition("\n")[0], names)
    assert names["config"] == made.config()

    monkeypatch.chdir(tmp_path)
    if "comparison.yaml" in lines:
        Path("comparison.yaml").write_text(lines["comparison.yaml"])
    monkeypatch.setattr(Comparison, "run", lambda config, **_: seen.update(config=config) or {"all_facts_hold": True})
    monkeypatch.setattr("nbhelpers.commands_comparison.write_report", lambda _: None)
    monkeypatch.setattr("nbhelpers.commands_comparison.show_comparison", lambda _: "")
    words = shlex.split(lines["command line"])[1:]
    done = CliRunner().invoke(cli.build(words), words)
    assert done.exit_code == 0 and seen["config"] == made.config(), done.output


def test_models_with_settings_of_their_own_are_no_form():
    config = ComparisonConfig(slm_models=[{"name": "tiny-llama", "lora_rank": 4}, {"name": "tiny-gpt2"}])
    assert form_of(config) is None
    assert plain_config(config)["slm_models"] == [{"name": "tiny-llama", "lora_rank": 4}, "tiny-gpt2"]
    plain = ComparisonConfig(epochs=2, baselines="majority")
    assert form_of(plain).comparison() == plain and texts(form_of(plain))["baselines"] == "majority"


def test_the_parameters_of_the_notebook_are_fields_of_its_config_and_papermill_reads_every_one():
    from papermill import inspect_notebook

    found = inspect_notebook(str(NOTEBOOK))
    assert {*found} == {*ComparisonPanel.parameters, "resume", "more"}
    assert all(one["help"] for one in found.values())
    assert {*ComparisonPanel.parameters} <= {*ComparisonForm.model_fields}


@pytest.mark.slow
def test_the_notebook_runs_headless_with_data_of_ones_own(tmp_path, talks):
    values = {"data": str(talks), "dialogue_column": "what was said", "label_column": "topic"}
    values |= {"llm_models": "tiny-llama", "slm_models": "tiny-gpt2", "epochs": "1", "max_eval_samples": "none"}
    found = headless.run_notebooks(["04_llm_vs_slm"], values, tmp_path)
    assert found["all_facts_hold"], found["summary"]
    [name] = found["notebooks"][0]["runs"]
    run = read_run(tmp_path / "runs" / name)
    assert run.config["label_column"] == "topic" and run.result["data"]["rows"]["test"] == 8
