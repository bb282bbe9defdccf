"""Does EXPERIMENT_LOG.md say what was done and what is missing, and is every note by hand kept?"""

from __future__ import annotations

import pytest
from many_runs import a_run, pruning_run

from nbhelpers.journal import merged, write_journal
from nbhelpers.records import write_json


def text_of(folder):
    return (folder / "EXPERIMENT_LOG.md").read_text(encoding="utf-8")


def test_completed_runs_stand_with_their_numbers_and_others_without(tmp_path):
    pruning_run(tmp_path / "a", 4.0, 6.0, 5.0)
    a_run(tmp_path / "b", [1.0], status="failed", name="broke")
    found = write_journal(tmp_path)
    text = text_of(tmp_path)
    assert (found["completed"], found["unfinished"], found["metric"]) == (1, 1, "fine_tuned/perplexity")
    completed, rest = text.split("<!-- nbhelpers: end of completed -->")
    assert "| 4.00 | 6.00 | 5.00 | 50.0 |" in completed and "broke" not in completed
    assert "| failed |" in rest


def test_the_best_of_each_group_is_named_by_its_mean_over_seeds(tmp_path):
    for seed, tuned in enumerate((5.0, 7.0)):
        pruning_run(tmp_path / f"g{seed}", 4.0, 8.0, tuned, seed=seed)
    pruning_run(tmp_path / "r", 4.0, 8.0, 5.5, strategy="random")
    (best,) = write_journal(tmp_path)["best"]
    assert best["group"] == "pruning m" and best["value"] == 5.5  # the mean of 5 and 7 is 6
    assert "strategy random" in text_of(tmp_path)


def test_jobs_of_a_plan_that_no_finished_run_did_are_planned(tmp_path):
    jobs = {key: {"name": f"cell {key}", "config": {"level": level}} for key, level in (("aa", 0.1), ("bb", 0.2))}
    write_json(tmp_path / "plan.json", {"format": 1, "jobs": jobs})
    pruning_run(tmp_path / "runs" / "aa-1", 4.0, 6.0, 5.0, level=0.1)
    a_run(tmp_path / "runs" / "bb-1", status="failed")
    assert write_journal(tmp_path)["planned"] == 1
    planned = text_of(tmp_path).split("<!-- nbhelpers: planned -->")[1].split("<!-- nbhelpers: end")[0]
    assert "| cell bb | level 0.200 |" in planned and "cell aa" not in planned


@pytest.mark.parametrize("content", ["{", "[]", '{"jobs": 3}', '{"jobs": [3]}'])
def test_a_plan_that_cannot_be_read_plans_nothing(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    assert write_journal(tmp_path)["planned"] == 0


def test_notes_by_hand_are_kept_wherever_they_stand(tmp_path):
    a_run(tmp_path / "a", [1.0])
    write_journal(tmp_path)
    path = tmp_path / "EXPERIMENT_LOG.md"
    text = "top 🙂\n" + text_of(tmp_path) + "below\n"
    text = text.replace("<!-- nbhelpers: planned -->", "between\n\n<!-- nbhelpers: planned -->")
    path.write_text(text, encoding="utf-8")
    write_journal(tmp_path)
    assert text_of(tmp_path) == text
    a_run(tmp_path / "b", [0.5])
    write_journal(tmp_path)
    again = text_of(tmp_path)
    assert again.startswith("top 🙂\n") and again.endswith("below\n") and "\nbetween\n" in again
    assert again.count("<!-- nbhelpers: completed -->") == 1 and again != text


def test_a_file_without_marks_is_kept_whole_and_added_to(tmp_path):
    (tmp_path / "EXPERIMENT_LOG.md").write_text("all mine", encoding="utf-8")
    write_journal(tmp_path)
    assert text_of(tmp_path).startswith("all mine\n\n<!-- nbhelpers: completed -->")


@pytest.mark.parametrize("torn", ["B\nmy notes\n", "my notes\nE\n", "E\nmy notes\nB\n", "B\nE\nmy notes\nB\nE\n"])
def test_marks_torn_apart_are_refused_and_the_file_stays(tmp_path, torn):
    torn = torn.replace("B", "<!-- nbhelpers: completed -->").replace("E", "<!-- nbhelpers: end of completed -->")
    (tmp_path / "EXPERIMENT_LOG.md").write_text(torn, encoding="utf-8")
    with pytest.raises(ValueError, match="marks of section 'completed'.*torn apart: put back"):
        write_journal(tmp_path)
    assert text_of(tmp_path) == torn


def test_a_name_can_break_neither_the_table_nor_the_marks(tmp_path):
    a_run(tmp_path / "a", [1.0], name="a|b\n<!-- nbhelpers: planned --> 🙂")
    write_journal(tmp_path)
    write_journal(tmp_path)
    assert "a\\|b &lt;!-- nbhelpers" in text_of(tmp_path)


def test_no_text_of_a_user_stands_in_the_journal(tmp_path):
    for at, prompt in enumerate(("canary one", "canary two")):
        a_run(tmp_path / str(at), [1.0], {"samples": {"x": prompt}}, sample_prompt=prompt, notes=prompt)
    write_json(tmp_path / "plan.json", {"jobs": {"z": {"config": {"prompt": "canary three"}}}})
    write_journal(tmp_path)
    assert "canary" not in text_of(tmp_path)


def test_a_second_section_is_added_once():
    once = merged("mine\n", {"planned": "x"})
    assert merged(once, {"planned": "x"}) == once and once.count("## Planned") == 1
