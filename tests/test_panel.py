"""Does the panel run what the form says, stop when it is asked to, and show whatever goes wrong?"""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from nbhelpers import colab, panel, plots, runtime
from nbhelpers.panel import Panel
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker, Interrupted
from nbhelpers.widgets import Form

FACTS = [
    {"name": "f", "ok": True, "says": "it <holds>", "saw": "1"},
    {"name": "g", "ok": False, "says": "b", "saw": "2"},
]


class Work(BaseModel):
    name: str = "work"
    steps: int = Field(3, ge=1, description="how many")
    rate: float | None = Field(None, gt=0, description="a rate")


class WorkPanel(Panel):
    """Counts steps, one each time `let` allows it, and leaves a run directory."""

    title = "Work <1>"

    def __init__(self, root: Path, **options) -> None:
        self.let, self.at_work, self.seen, self.broken = threading.Semaphore(0), threading.Event(), [], None
        super().__init__(Form(Work, Work().model_dump(), main=["steps"], hidden=["name"]), root, **options)

    def carry_out(self, config, progress, should_stop):
        with ExperimentTracker(ExperimentConfig(kind="work", **config.model_dump()), self.root) as tracker:
            for step in range(1, config.steps + 1):
                while not self.let.acquire(timeout=0.01):
                    self.at_work.set()
                    if should_stop():
                        raise Interrupted(f"stopped in step {step}")
                if self.broken:
                    raise self.broken
                progress({"stage": "working", "step": step, "steps": config.steps})
            result = {"verdict": f"{config.steps} steps <done>", "facts": FACTS, "run_dir": str(tracker.run_dir)}
            tracker.finish(result)
        return result

    def phases(self, config):
        return {"working": 60.0}

    def hear(self, now):
        self.seen.append(now["step"])

    def figures(self):
        figure = plots.Figure(figsize=(1, 1))
        figure.add_subplot().plot(self.seen)
        return {"steps": figure} if self.seen else {}

    def table(self):
        return f"{len(self.seen)} steps"

    def lines(self, config):
        return {"command line": f"work --steps {config.steps} <"}


@pytest.fixture
def made(tmp_path):
    panel_made = WorkPanel(tmp_path / "runs")
    yield panel_made
    panel_made.stop()
    panel_made.wait(20)


def runs(made: WorkPanel) -> list[Path]:
    return sorted(made.root.iterdir()) if made.root.is_dir() else []


def released(made: WorkPanel, steps: int = 100) -> WorkPanel:
    made.let.release(steps)
    return made


def click_and_wait(made: WorkPanel) -> None:
    made._run_clicked()
    made.wait(20)


def test_run_now_does_what_the_form_says_and_returns_the_result(made):
    released(made).form.put({"steps": 2})
    assert made.run_now()["verdict"] == "2 steps <done>" and made.seen == [1, 2]
    assert made.state == "finished" and runs(made)[0].name in made.status.value


def test_what_was_found_is_shown_escaped(made):
    released(made).run_now()
    assert "3 steps &lt;done&gt;" in made.verdict.value and "it &lt;holds&gt;" in made.facts.value
    assert "1 of 2 checked facts hold" in made.facts.value and "FAILED" in made.facts.value
    assert "work --steps 3 &lt;" in made.equivalent.value and made.tables.value == "3 steps"
    assert bytes(made.pictures["steps"].value).startswith(b"\x89PNG")
    assert "Work &lt;1&gt;" in made.head.value


def test_run_now_raises_what_the_run_raises_and_shows_one_line_with_the_traceback_folded(made):
    made.broken = ValueError("level must be in [0, 1],\ngot 2")
    with pytest.raises(ValueError, match="level must be"):
        released(made).run_now()
    assert made.state == "failed" and made.result is None
    assert '<div class="nbh-line">level must be in [0, 1], got 2</div>' in made.error.value
    assert "<details" in made.error.value and "carry_out" in made.error.value
    assert (made.run_button.disabled, made.stop_button.disabled) == (False, True)


def test_a_click_runs_in_a_thread_and_restores_the_buttons(made):
    made._run_clicked()
    assert made.at_work.wait(20) and made.busy
    assert (made.run_button.disabled, made.stop_button.disabled) == (True, False)
    assert all(part.disabled for control in made.form.controls.values() for part in control.parts)
    released(made).wait(20)
    assert made.state == "finished" and made.seen == [1, 2, 3]
    assert (made.run_button.disabled, made.stop_button.disabled) == (False, True)
    assert not any(part.disabled for control in made.form.controls.values() for part in control.parts)


def test_a_second_click_while_running_starts_no_second_run(made):
    made._run_clicked()
    assert made.at_work.wait(20)
    made._run_clicked()
    released(made).wait(20)
    assert len(runs(made)) == 1 and made.error.value == ""


def test_stop_before_a_start_does_nothing(made):
    made._stop_clicked()
    assert made.state == "ready" and not made.stop_asked.is_set() and made.error.value == ""
    released(made).run_now()
    assert made.state == "finished"


def test_stop_in_the_middle_leaves_an_interrupted_run_and_run_after_stop_works(made):
    from nbhelpers.runs import read_run

    made._run_clicked()
    assert made.at_work.wait(20)
    made._stop_clicked()
    made.wait(20)
    assert made.state == "stopped" and "stopped in step 1" in made.status.value
    assert [read_run(folder).status for folder in runs(made)] == ["interrupted"]
    assert made.result is None and made.download_button.disabled
    click_and_wait(released(made))
    assert made.state == "finished" and len(runs(made)) == 2


def test_run_now_raises_interrupted_after_a_stop(made):
    threading.Thread(target=lambda: made.at_work.wait(60) and made.stop(), daemon=True).start()
    with pytest.raises(Interrupted):
        made.run_now()
    assert made.state == "stopped"


def test_in_a_cell_stop_is_the_notebooks_own_button_and_the_status_says_so(made):
    seen = []
    made._show_progress = lambda: (
        type(made)._show_progress(made),
        seen.append((made.stop_button.disabled, made.status.value)),
        made.let.release(9),
    )
    made.run_now()
    assert seen[0][0] is True and "stop it with the notebook's ■ button" in seen[0][1].replace("&#39;", "'")


def test_another_panel_of_the_same_kernel_waits_and_may_stop_the_run(made, tmp_path):
    made._run_clicked()
    assert made.at_work.wait(20)
    other = WorkPanel(tmp_path / "other")
    other._run_clicked()
    assert "another run is going on in this kernel" in other.error.value and runs(other) == []
    other._stop_clicked()
    made.wait(20)
    assert made.state == "stopped"


def test_a_refused_value_disables_run_until_it_is_put_right(made):
    made.form.controls["rate"].parts[0].value = "0"
    assert made.run_button.disabled and "refused" in made.status.value
    made._run_clicked()
    assert "rate must be greater than 0" in made.error.value and runs(made) == []
    made.form.controls["rate"].parts[0].value = "0.1"
    assert not made.run_button.disabled


def test_a_picture_that_cannot_be_drawn_is_said_and_does_not_lose_the_run(made, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda *_a, **_k: 1 / 0)
    assert released(made).run_now()["verdict"] == "3 steps <done>"
    assert "division by zero" in made.error.value and made.state == "finished"


def test_a_handler_that_fails_says_so_in_the_panel(made, monkeypatch):
    monkeypatch.setattr(made, "archive", lambda: 1 / 0)
    made._download_clicked()
    assert "no finished run to download yet" in made.error.value
    released(made).run_now()
    made._download_clicked()
    assert "division by zero" in made.error.value and not made.download_button.disabled


def test_the_archive_offered_is_that_of_the_last_run(made):
    released(made).run_now()
    made.run_now()
    made._download_clicked()
    last = Path(made.result["run_dir"]).name
    assert last in made.download_link.value and "data:application/zip;base64," in made.download_link.value
    assert any(name.endswith("result.json") for name in zipfile.ZipFile(made.archive()).namelist())


def test_a_large_archive_is_named_instead_of_put_into_the_page(made, monkeypatch):
    monkeypatch.setattr(panel, "LINK_BYTES", 10)
    released(made).run_now()
    made._download_clicked()
    assert "base64" not in made.download_link.value and str(made.archive()) in made.download_link.value


def test_the_next_run_clears_what_the_last_one_showed(made):
    made.broken = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        released(made).run_now()
    made.broken = None
    made.run_now()
    assert made.error.value == ""


def test_without_a_front_end_nothing_is_drawn_and_nothing_displayed(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda *_a, **_k: 1 / 0)
    quiet = released(WorkPanel(tmp_path, live=False))
    quiet.show()
    assert quiet.run_now()["verdict"] and quiet.error.value == ""


def test_after_a_run_a_changed_form_says_whose_results_are_shown(made):
    released(made).run_now()
    made.form.put({"steps": 5})
    assert made.state == "ready" and f"shown below is {Path(made.result['run_dir']).name}" in made.status.value


def test_a_form_change_says_that_the_form_decides_and_about_how_long_it_takes(made):
    made.form.put({"steps": 5})
    assert "the form decides" in made.status.value
    made._show_estimate()
    assert "about 60 s" in made.estimate.value


def test_an_estimate_that_cannot_be_had_is_said(made, monkeypatch):
    def unknown(config):
        raise LookupError("known once the text is here")

    monkeypatch.setattr(made, "phases", unknown)
    made._show_estimate()
    assert "not known: known once the text is here" in made.estimate.value


# Colab ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_colab(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "where", lambda: "colab")
    monkeypatch.setattr(Panel, "_drive_asked", False)
    monkeypatch.setattr(Panel, "_drive", None)
    return tmp_path / "drive"


def test_the_first_run_in_colab_asks_once_and_keeps_every_run_in_drive(made, in_colab, monkeypatch):
    in_colab.mkdir()
    monkeypatch.setattr(colab, "mount_drive", lambda tell: in_colab)
    made._run_clicked()
    assert runs(made) == [] and [b.description for b in made.drive_box.children[1:]] == [
        "Keep results in Drive",
        "Only on this machine",
    ]
    released(made).drive_box.children[1].click()
    made.wait(20)
    click_and_wait(made)
    assert {folder.name for folder in in_colab.iterdir()} == {folder.name for folder in runs(made)}
    assert len(runs(made)) == 2 and str(in_colab) in made.drive_box.children[0].value


def test_a_refused_drive_is_said_and_the_run_goes_on_here(made, in_colab, monkeypatch):
    def refuse(tell):
        tell("Drive was refused")

    monkeypatch.setattr(colab, "mount_drive", refuse)
    made._run_clicked()
    released(made).drive_box.children[1].click()
    made.wait(20)
    assert "Drive was refused" in made.drive_box.children[0].value and made.state == "finished"


def test_in_colab_the_archive_goes_through_colabs_own_download(made, in_colab, monkeypatch):
    sent = []
    monkeypatch.setattr(colab, "download", lambda path: sent.append(Path(path)) or "on its way")
    monkeypatch.setattr(Panel, "_drive_asked", True)
    released(made).run_now()
    made._download_clicked()
    assert sent == [made.archive()] and "on its way" in made.download_link.value
