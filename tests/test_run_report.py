"""Does one page say what lies in a folder of runs, whatever they are, with an error and no number where one failed?"""

from __future__ import annotations

import contextlib

import planted_comparison as planted
import pytest
from fake_jobs import plan
from many_runs import a_run
from run_folders import tracker

from nbhelpers import comparison_html, run_report, sparsity_report, sweep
from nbhelpers.tracking import ExperimentConfig

EVIL = "<script>alert(1)</script>"


def failed_run(folder, message="loss is not <b>finite</b>", losses=()):
    with contextlib.suppress(RuntimeError), tracker(folder, ExperimentConfig(name="bad", kind="test", lr=0.5)) as run:
        for loss in losses:
            run.log_metrics(train_loss=loss)
        raise RuntimeError(message)
    return folder


def page(folder) -> str:
    return run_report.write(folder).read_text()


def test_runs_of_all_kinds_stand_in_a_table_of_their_kind_with_their_numbers(tmp_path):
    a_run(tmp_path / "a", losses=(3.0, 1.25), name="one", lr=0.1)
    a_run(tmp_path / "deep" / "b", losses=(2.0,), name="two", lr=0.2)
    a_run(tmp_path / "c", result={"accuracy": 0.75, "verdict": "Three of four."}, name="three", kind="evaluation")
    path = run_report.write(tmp_path)
    text = path.read_text()
    assert path == tmp_path / "report.html" and "3 runs: 3 finished." in text
    assert "<h2>test</h2>" in text and "<h2>evaluation</h2>" in text and "Three of four." in text
    assert '<td class="n">1.25</td>' in text and '<td class="n">0.750</td>' in text and "<td>0.2</td>" in text
    assert "http" not in text and text.count("<table") == text.count('<div class="wide"><table')


def test_a_failed_run_shows_its_error_and_no_number(tmp_path):
    a_run(tmp_path / "good", losses=(1.25,), name="good", lr=0.1)
    failed_run(tmp_path / "bad", losses=(7.77,))
    text = page(tmp_path)
    assert '<p class="failed">RuntimeError: loss is not &lt;b&gt;finite&lt;/b&gt;</p>' in text
    assert "7.77" not in text and '<td class="n">-</td>' in text and "1 finished, 1 failed" in text


def test_an_error_is_cut_and_a_secret_in_it_is_masked(tmp_path):
    failed_run(tmp_path / "bad", message="no access with hf_abcdefghijkl " + "x" * 1000)
    text = page(tmp_path)
    assert "hf_abc" not in text and "***" in text and "x" * 200 in text and "x" * 300 not in text


def test_facts_figures_and_the_stamp_come_as_in_the_index_of_notebooks(tmp_path):
    stages = {stage: {"perplexity": value} for stage, value in (("baseline", 5.0), ("pruned", 9.0))}
    pruned = {"model": "m", "strategy": "gradient", "level": 0.3, "verdict": "Pruned.", "text": {"generated": True}}
    a_run(tmp_path / "p", result=stages | pruned, kind="pruning")
    facts = [{"name": "f", "ok": False, "says": "nothing leaks", "saw": "2 rows"}]
    a_run(tmp_path / "q", result={"facts": facts}, name="q")
    text = page(tmp_path)
    assert text.count("data:image/png;base64,") == 1 and "1 of 2 runs is on text or rows that this project" in text
    assert "FAILED: nothing leaks" in text and "test: q" not in text


def test_text_of_users_in_a_config_stays_out_and_all_text_is_escaped(tmp_path):
    for number in range(2):
        a_run(tmp_path / str(number), name=EVIL, prompt=f"my neighbour coughs {number}", note=EVIL)
    text = page(tmp_path)
    assert "neighbour" not in text and "sha256:" in text and "<script" not in text and "&lt;script&gt;" in text


def test_runs_that_were_asked_about_rows_show_model_task_and_accuracy_and_that_the_rows_are_generated(tmp_path):
    asked = {"n": 40, "acc": 0.4, "protocol": {"generated": True}}
    a_run(tmp_path / "a", result=asked, name="asked", kind="evaluation", model="tiny-llama", task="boolq")
    text = page(tmp_path)
    assert "<th>model</th><th>task</th><th>rows</th><th>accuracy</th>" in text
    assert '<td>tiny-llama</td><td>boolq</td><td class="n">40</td><td class="n">0.400</td>' in text
    assert "1 of 1 runs is on text or rows that this project generated itself" in text


def test_measures_are_in_words_and_a_claim_stands_once_with_what_every_model_showed(tmp_path):
    stages = {"baseline": {"perplexity": 5.0}, "fine_tuned": {"perplexity": 4.0}, "improvement_percent": 20.0}
    facts = [{"ok": True, "says": "nothing leaks", "saw": f"{n} rows", "model": f"SLM_m{n}_finetuned"} for n in (1, 2)]
    a_run(tmp_path / "p", result=stages | {"facts": facts}, name="p")
    text = page(tmp_path)
    assert "<th>perplexity, baseline</th><th>perplexity, fine-tuned</th><th>improvement, %</th>" in text
    assert text.count("nothing leaks") == 1 and "(m1 (fine-tuned): 1 rows; m2 (fine-tuned): 2 rows)" in text


def test_a_comparison_gets_its_own_report_and_among_other_runs_its_verdict_and_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_html, "FIGURES", {})
    made = planted.result()
    folder = planted.run(tmp_path / "runs" / "compared", made)
    assert run_report.write(folder) == folder / "report.html"
    assert "Can specialisation beat size?" in (folder / "report.html").read_text()
    text = page(tmp_path / "runs")
    assert made["verdict"][:40] in text and text.count("data:image/png;base64,") == 1
    assert 'href="compared/report.html"' in text, "beside it, for as long as the folder is whole"


def test_a_sweep_of_sparsities_gets_the_report_of_its_kind(tmp_path, monkeypatch):
    asked = []

    def write(folder):
        asked.append(folder)
        return {"files": [str(folder / "report" / "summary.md"), str(folder / "report" / "report.html")]}

    monkeypatch.setattr(sparsity_report, "write", write)
    monkeypatch.setattr(run_report, "Ledger", lambda folder: type("Ledger", (), {"plan": {"kind": "sparsity"}}))
    (tmp_path / "plan.json").write_text("{}")
    assert run_report.write(tmp_path) == tmp_path / "report" / "report.html" and asked == [tmp_path]


def test_a_sweep_of_another_kind_is_a_folder_of_runs(tmp_path):
    sweep.run(plan(), tmp_path / "s")
    assert "finished" in page(tmp_path / "s")


def test_of_many_runs_the_newest_have_a_part_of_their_own_and_the_rest_is_counted(tmp_path, monkeypatch):
    for number in range(5):
        a_run(tmp_path / str(number), name=f"run-{number}", lr=number)
    monkeypatch.setattr(run_report, "MOST_RUNS", 2)
    monkeypatch.setattr(run_report, "MOST_ROWS", 4)
    text = page(tmp_path)
    assert text.count("<section>") == 2 and "3 earlier ones stand in the tables alone" in text
    assert "1 earlier one is not shown" in text and text.count("<tr>") == 1 + 4


def test_a_folder_without_runs_is_refused_and_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no runs: name a run directory"):
        run_report.write(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        run_report.write(tmp_path / "none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no runs that can be read .*broken"):
        run_report.write(tmp_path)
    a_run(tmp_path / "good")
    assert "What could not be read" in page(tmp_path)


def test_one_run_and_one_log_are_reported_too(tmp_path):
    folder = a_run(tmp_path / "one", losses=(1.25,), name="alone")
    assert "1 run: 1 finished." in page(folder)
