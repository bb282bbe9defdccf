"""Is every job of a plan done exactly once, whatever fails, stops or kills, and is what happened on record?"""

from __future__ import annotations

import math
import signal
from types import SimpleNamespace

import fake_jobs
import pytest
from fake_jobs import done, plan, process, statuses

from nbhelpers import attempts, grid, retry_rules, sweep
from nbhelpers import ledger as ledgers
from nbhelpers.ledger import Ledger
from nbhelpers.records import append_line, read_json, write_json
from nbhelpers.runlock import utc_now
from nbhelpers.runs import read_run

FOUR = {"axes": {"a": [1, 2], "b": [0.0, 0.5]}}


def states(folder) -> dict[tuple, str]:
    """Status by (a, what)."""
    ledger = Ledger(folder)
    return {(ledger.jobs[key].config["a"], ledger.jobs[key].config["what"]): s for key, s in ledger.states().items()}


# ------------------------------------------------------------------------------------------------ all is well


def test_every_job_is_done_and_leaves_an_ordinary_run_directory(tmp_path):
    found = sweep.run(plan(**FOUR), tmp_path / "s")
    assert (found["planned"], found["done"], found["missing"], found["ended"]) == (4, 4, 0, "done")
    assert statuses(tmp_path / "s") == ["finished"] * 4
    rows = {(row["a"], row["b"]): row["total"] for row in sweep.results(tmp_path / "s")}
    assert rows == {(1, 0.0): 1.0, (1, 0.5): 1.5, (2, 0.0): 2.0, (2, 0.5): 2.5}


def test_a_second_run_does_nothing_and_changes_no_result(tmp_path):
    sweep.run(plan(**FOUR), tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "runs").rglob("*")}
    assert sweep.run(plan(**FOUR), tmp_path / "s")["tried"] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "runs").rglob("*")} == before


def test_an_alias_is_done_once_and_stands_in_the_results_as_an_alias(tmp_path):
    rule = [{"when": {"b": 0.0}, "ignore": ["a"]}]
    found = sweep.run(plan(**FOUR, aliases=rule), tmp_path / "s")
    assert (found["rows"], found["planned"], found["aliases"], found["done"]) == (4, 3, 1, 3)
    rows = sweep.results(tmp_path / "s")
    assert [(row["a"], row["b"], row["alias"], row["total"]) for row in rows] == [
        (1, 0.0, False, 1.0),
        (1, 0.5, False, 1.5),
        (2, 0.0, True, 1.0),
        (2, 0.5, False, 2.5),
    ]


def test_results_of_a_sweep_that_is_not_done_have_their_missing_cells(tmp_path):
    asked = iter([False, True])
    sweep.run(plan(**FOUR), tmp_path / "s", should_stop=lambda: next(asked, True))
    rows = sweep.results(tmp_path / "s")
    assert sorted(row["status"] for row in rows) == ["interrupted", "planned", "planned", "planned"]
    assert all("total" not in row for row in rows)


def test_a_plan_with_more_jobs_does_the_new_ones_and_names_those_no_longer_planned(tmp_path):
    sweep.run(plan(axes={"a": [1, 2]}), tmp_path / "s")
    found = sweep.run(plan(axes={"a": [2, 3]}), tmp_path / "s")
    assert (found["planned"], found["done"], found["tried"], found["no_longer_planned"]) == (2, 2, 1, 1)
    assert len(statuses(tmp_path / "s")) == 3
    assert sweep.run(plan(axes={"a": [1, 2, 3]}), tmp_path / "s")["tried"] == 0


def test_a_preview_counts_and_runs_nothing(tmp_path):
    found = sweep.preview(plan(**FOUR, aliases=[{"when": {"b": 0.0}, "ignore": ["a"]}]))
    assert (found["rows"], found["jobs"], found["aliases"], found["not_estimated"]) == (4, 3, 1, 3)
    assert found["estimated_hours"] is None and len(found["order"]) == 3


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "what, status, failure, error",
    [
        ("oom", "failed", "out of memory", "tried to allocate 20 GiB"),
        ("diverge", "diverged", "diverged", "the loss is not finite"),
        ("bad", "failed", "bad input", "unknown text 'x'"),
        ("refused", "failed", "bad input", "a must be odd, got 2"),
        ("bug", "failed", "error", "ZeroDivisionError: division by zero"),
        ("disk", "failed", "error", "OSError: cannot use: no space left on device; check the path"),
    ],
)
def test_a_job_that_fails_is_recorded_with_its_class_and_the_rest_goes_on(what, status, failure, error, tmp_path):
    found = sweep.run(plan(axes={"what": [what, "fine"], "a": [1, 2]}), tmp_path / "s")
    assert (found["done"], found["failed"], found["ended"]) == (2, 2, "done")
    assert found["failed_by_class"] == {**dict.fromkeys(ledgers.FAILURES, 0), failure: 2}
    state = states(tmp_path / "s")[1, what]
    assert (state.status, state.failure) == (status, failure) and state.error.startswith(error)
    assert read_run(state.run_dir).status == status


def test_failed_jobs_stay_failed_until_a_retry_of_their_class_is_asked_for(tmp_path, monkeypatch):
    values = plan(axes={"what": ["bug", "bad", "fine"]})
    sweep.run(values, tmp_path / "s")
    assert sweep.run(values, tmp_path / "s")["tried"] == 0
    assert len(sweep.retry(tmp_path / "s", ["error"])) == 1
    assert sweep.status(tmp_path / "s")["missing"] == 1
    monkeypatch.setattr(fake_jobs, "_raise", lambda what: None)
    found = sweep.run(values, tmp_path / "s")
    assert (found["tried"], found["done"], found["failed_by_class"]["bad input"]) == (1, 2, 1)
    assert statuses(tmp_path / "s") == ["failed", "failed", "finished", "finished"]  # the first try is still there
    assert sweep.retry(tmp_path / "s", ["error"]) == []


def test_a_retry_that_fails_again_is_final_again(tmp_path):
    values = plan(base={"what": "bug"})
    sweep.run(values, tmp_path / "s")
    assert len(sweep.retry(tmp_path / "s")) == 1
    assert sweep.run(values, tmp_path / "s")["tried"] == 1
    assert sweep.run(values, tmp_path / "s")["tried"] == 0 and statuses(tmp_path / "s") == ["failed", "failed"]


def test_an_unknown_failure_class_is_refused_with_the_known_ones(tmp_path):
    sweep.run(plan(), tmp_path / "s")
    with pytest.raises(LookupError, match="unknown failure class 'oom'.*out of memory, diverged, bad input, error"):
        sweep.retry(tmp_path / "s", ["oom"])


def test_a_result_that_is_not_a_number_is_null_with_a_flag_and_no_number(tmp_path):
    sweep.run(plan(base={"what": "nan"}), tmp_path / "s")
    (row,) = sweep.results(tmp_path / "s")
    assert row["total"] is None and row["not_finite"] == {"total": "nan"} and row["status"] == "finished"


def test_a_secret_in_an_error_does_not_get_into_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_jobs, "_raise", lambda what: (_ for _ in ()).throw(RuntimeError("hf_abcdefghijklmnop")))
    sweep.run(plan(), tmp_path / "s")
    written = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert b"RuntimeError: ***" in written and b"hf_abcdef" not in written


def test_a_job_whose_run_directory_does_not_say_finished_is_no_result(tmp_path, monkeypatch):
    def careless(config, *, run_dir, progress, should_stop):
        run_dir.mkdir()
        (run_dir / "half").write_text("x")
        return {"total": 1.0}

    monkeypatch.setattr(fake_jobs, "run_fake", careless)
    found = sweep.run(plan(), tmp_path / "s")
    assert (found["done"], found["failed_by_class"]["bad input"] + found["failed_by_class"]["error"]) == (0, 1)
    assert sweep.run(plan(), tmp_path / "s")["tried"] == 0


@pytest.mark.parametrize("what", ["fine", "oom", "interrupt"])
def test_a_job_that_another_process_took_over_meanwhile_is_that_one_s_to_record(what, tmp_path):
    expansion = grid.expand(grid.read_plan(plan(base={"what": what})))
    ledger = Ledger.create(tmp_path / "s", expansion)
    (job,) = ledger.jobs.values()

    def sleep(now: dict) -> None:
        for folder in ("leases/" + job.id, f"runs/{job.id}-1"):
            for name in ("lock", "heartbeat.json"):
                owner = {"host": "elsewhere", "pid": 1, "utc": utc_now(), "token": "theirs"}
                write_json(ledger.folder / folder / name, owner)

    doer = attempts.Doer(expansion, ledger, progress=sleep)
    if what == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            doer.do(job)
    else:
        assert doer.do(job) is None
    assert [note["event"] for note in ledger.notes()[job.id]] == ["started"]
    assert ledger.state(job.id).status == "running"


# ------------------------------------------------------------------------------------------------ retry rules


@pytest.mark.parametrize(
    "failure, config, change",
    [
        ("out of memory", {"micro_batch_size": None, "batch_size": 8}, {"micro_batch_size": 4}),
        ("out of memory", {"micro_batch_size": 3, "batch_size": 8}, {"micro_batch_size": 1}),
        ("out of memory", {"micro_batch_size": 1, "batch_size": 8}, None),
        ("out of memory", {"batch_size": 8}, None),
        ("diverged", {"micro_batch_size": 8, "batch_size": 8}, None),
        ("bad input", {"micro_batch_size": 8, "batch_size": 8}, None),
        ("error", {"micro_batch_size": 8, "batch_size": 8}, None),
    ],
)
def test_only_what_ran_out_of_memory_is_tried_again_with_half_the_micro_batch(failure, config, change):
    assert retry_rules.again(failure, config) == change


def lines(folder, event: str) -> list[dict]:
    return [note for notes in Ledger(folder).notes().values() for note in notes if note["event"] == event]


def test_a_job_out_of_memory_is_tried_again_with_less_at_once_until_it_fits_and_the_record_says_so(tmp_path):
    found = sweep.run(plan(axes={"what": ["oom above 2", "fine"]}), tmp_path / "s")  # 8 rows a step: 8, 4, 2
    assert (found["done"], found["failed"], found["tried"], found["ended"]) == (2, 0, 4, "done")
    assert [(line["because"], line["micro_batch_size"]) for line in lines(tmp_path / "s", "retry")] == [
        ("out of memory", 4),
        ("out of memory", 2),
    ]
    failures = [line["failure"] for line in lines(tmp_path / "s", "ended") if line["status"] == "failed"]
    assert failures == ["out of memory"] * 2
    sizes = [read_run(path).config["micro_batch_size"] for path in sorted((tmp_path / "s" / "runs").glob("*-[123]"))]
    assert sorted(sizes, key=str) == [2, 4, None, None], "what a job is did not change"


def test_a_job_that_does_not_fit_row_by_row_stays_failed_and_a_person_s_retry_begins_anew(tmp_path):
    values = plan(base={"what": "oom above 0"})
    assert sweep.run(values, tmp_path / "s")["failed_by_class"]["out of memory"] == 1
    assert [line["micro_batch_size"] for line in lines(tmp_path / "s", "retry")] == [4, 2, 1]
    assert sweep.run(values, tmp_path / "s")["tried"] == 0
    sweep.retry(tmp_path / "s", ["out of memory"])
    assert sweep.run(values, tmp_path / "s")["tried"] == 4


@pytest.mark.parametrize("what, failure", [("diverge", "diverged"), ("bug", "error"), ("bad", "bad input")])
def test_no_other_failure_is_tried_again_by_itself_and_its_traceback_stands_in_its_run(what, failure, tmp_path):
    sweep.run(plan(base={"what": what}), tmp_path / "s")
    (job,) = sweep.status(tmp_path / "s")["jobs"]
    assert (job["failure"], job["tries"]) == (failure, 1) and lines(tmp_path / "s", "retry") == []
    (error,) = [event for event in read_run(job["run_dir"]).events if event["kind"] == "error"]
    assert error["traceback"].startswith("Traceback") and "fake_jobs.py" in error["traceback"]


def started(reached: int) -> dict:
    return {"event": "started", "reached": reached}


@pytest.mark.parametrize(
    "notes, at, count",
    [
        ([], 0, 0),
        ([started(0), started(0)], 0, 2),
        ([started(0), started(0)], 5, 0),  # it got further: that try cost nothing
        ([started(0), started(5), started(5)], 5, 2),
        ([started(0), {"event": "ended"}, started(0)], 0, 1),  # one that ended was not killed
        ([started(0), started(0), {"event": "retry"}], 0, 0),  # a person asked again
        ([{"event": "started"}], 0, 0),  # of a version that did not write how far it was
    ],
)
def test_tries_count_as_killed_where_they_never_ended_and_came_no_further(notes, at, count):
    assert retry_rules.killed(notes, at) == count


@pytest.mark.slow
def test_a_job_that_kills_its_process_is_given_up_with_the_reason_and_the_sweep_ends(tmp_path):
    values = plan(axes={"what": ["kill", "fine"], "a": [1, 2]}, base={"log": str(tmp_path / "log"), "cost": 0.0})
    codes = []
    while not codes or codes[-1]:
        one = process(tmp_path / "s", values)
        one.communicate()
        codes.append(one.returncode)
        assert len(codes) < 20
    assert codes == [-signal.SIGKILL] * 2 * retry_rules.KILLED + [0]
    found = sweep.status(tmp_path / "s")
    assert (found["done"], found["failed_by_class"]["error"], found["missing"]) == (2, 2, 0)
    said = states(tmp_path / "s")[1, "kill"]
    assert "its process was killed 4 times in a row before its first step" in said.error
    assert read_run(said.run_dir).status == "failed"
    sweep.retry(tmp_path / "s")
    one = process(tmp_path / "s", values)
    assert (one.communicate(), one.returncode)[1] == -signal.SIGKILL, "a person may ask again"


# ------------------------------------------------------------------------------------------------ stop, kill, two


def test_stop_is_heard_and_the_next_run_goes_on(tmp_path):
    asked = iter([False, False, False, True])  # before job 1, in it, before job 2, in it
    found = sweep.run(plan(**FOUR), tmp_path / "s", should_stop=lambda: next(asked, True))
    assert (found["ended"], found["done"], found["interrupted"], found["missing"]) == ("stopped", 1, 1, 3)
    found = sweep.run(plan(**FOUR), tmp_path / "s")
    assert (found["tried"], found["done"], found["interrupted"]) == (3, 4, 0)
    assert statuses(tmp_path / "s") == ["finished"] * 4 + ["interrupted"]


def test_ctrl_c_in_a_job_ends_the_sweep_cleanly_and_the_job_is_interrupted(tmp_path):
    found = sweep.run(plan(axes={"what": ["interrupt"], "a": [1, 2]}), tmp_path / "s")
    assert (found["ended"], found["tried"], found["interrupted"], found["failed"]) == ("stopped", 1, 1, 0)
    assert sweep.status(tmp_path / "s")["running"] == 0


TWELVE = {"a": [1, 2, 3], "b": [0.0, 0.5]}


@pytest.mark.parametrize("moments", [("2 middle", "4 before"), ("1 after", "3 middle")])
def test_a_sweep_killed_twice_ends_with_every_job_done_exactly_once(moments, tmp_path):
    log = str(tmp_path / "log")
    values = plan(base={"log": log, "cost": 0.0}, axes=TWELVE, seeds=[0, 1])
    for moment in moments:
        killed = process(tmp_path / "s", values, moment)
        assert (killed.communicate(), killed.returncode)[1] == -signal.SIGKILL
    found = sweep.run(values, tmp_path / "s")
    assert (found["done"], found["missing"], found["failed"]) == (12, 0, 0)
    assert len(done(log)) == 12 == len(set(done(log)))
    assert statuses(tmp_path / "s").count("finished") == 12


def test_a_job_that_kills_its_process_does_not_keep_the_others_from_their_turn(tmp_path):
    values = plan(base={"log": str(tmp_path / "log"), "cost": 0.0}, axes={"a": [1, 2, 3]})
    killed = process(tmp_path / "s", values, "1 middle")
    killed.communicate()
    (left,) = [job["job"] for job in sweep.status(tmp_path / "s")["jobs"] if job["status"] == "interrupted"]
    begun = []
    sweep.run(values, tmp_path / "s", progress=lambda now: now["stage"] == "job started" and begun.append(now["job"]))
    assert len(begun) == 3 and begun[-1] == left


def test_two_processes_on_one_ledger_share_the_jobs_and_do_none_twice(tmp_path):
    log = str(tmp_path / "log")
    values = plan(base={"log": log, "cost": 0.1}, axes=TWELVE, seeds=[0, 1])
    both = [process(tmp_path / "s", values) for _ in range(2)]
    errors = [one.communicate()[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], errors
    assert len(done(log)) == 12 == len(set(done(log)))
    assert sweep.status(tmp_path / "s")["done"] == 12
    assert not list((tmp_path / "s" / "leases").rglob("lock"))


def test_a_job_that_another_process_holds_is_left_to_it_and_reads_running(tmp_path):
    sweep.run(plan(axes={"a": [1]}), tmp_path / "s")
    values = plan(axes={"a": [1, 2]})
    expansion = sweep.grid.expand(sweep.grid.read_plan(values))
    ledger = Ledger.create(tmp_path / "s", expansion)
    (other,) = [key for key, state in ledger.states().items() if state.status == "planned"]
    with ledger.lease(other) as ours:
        assert ours
        found = sweep.run(values, tmp_path / "s")
        assert (found["running"], found["tried"], found["missing"]) == (1, 0, 0)
    assert sweep.run(values, tmp_path / "s")["done"] == 2


def test_a_torn_line_in_the_ledger_costs_only_itself(tmp_path):
    sweep.run(plan(axes={"what": ["bug", "fine"]}), tmp_path / "s")
    path = tmp_path / "s" / "ledger.jsonl"
    path.write_bytes(b'{"event":"ended","jo\n' + path.read_bytes() + b'{"torn')
    append_line(path, {"event": "else"})
    assert states(tmp_path / "s")[0, "bug"].error == "ZeroDivisionError: division by zero"


def test_a_ledger_that_lost_its_lines_still_knows_status_and_error_from_the_runs(tmp_path):
    sweep.run(plan(axes={"what": ["oom", "diverge", "fine"]}), tmp_path / "s")
    (tmp_path / "s" / "ledger.jsonl").unlink()
    found = sweep.run(plan(axes={"what": ["oom", "diverge", "fine"]}), tmp_path / "s")
    assert (found["tried"], found["done"]) == (0, 1)
    assert (found["failed_by_class"]["out of memory"], found["failed_by_class"]["diverged"]) == (1, 1)


def test_a_torn_result_is_no_result_and_the_job_is_done_again_beside_it(tmp_path):
    sweep.run(plan(), tmp_path / "s")
    (torn,) = (tmp_path / "s" / "runs").glob("*/result.json")
    torn.write_text('{"total": 1')
    assert sweep.status(tmp_path / "s")["interrupted"] == 1
    assert sweep.run(plan(), tmp_path / "s")["done"] == 1 and torn.read_text() == '{"total": 1'


def test_a_disk_too_full_for_the_record_ends_the_sweep_instead_of_failing_every_job(tmp_path, monkeypatch):
    def full(*_rest, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledgers, "append_line", full)
    with pytest.raises(OSError, match="No space left"):
        sweep.run(plan(**FOUR), tmp_path / "s")
    monkeypatch.undo()
    assert sweep.run(plan(**FOUR), tmp_path / "s")["done"] == 4


@pytest.mark.parametrize(
    "content, said",
    [
        ({"format": 2, "plan": {}, "rows": [], "jobs": {}}, "has sweep format 2, this version reads up to 1"),
        ({"format": 1}, "is not the plan of a sweep"),
    ],
)
def test_a_folder_of_a_newer_or_foreign_format_is_refused(content, said, tmp_path):
    write_json(tmp_path / "plan.json", content)
    with pytest.raises(ValueError, match=said):
        sweep.run(plan(), tmp_path)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds 'thesis.txt' but no plan.json"):
        sweep.run(plan(), tmp_path)
    with pytest.raises(ValueError, match="is not a sweep"):
        sweep.status(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------------------------ time


@pytest.fixture
def clock(monkeypatch):
    """Time in which a fake job takes its `cost`, and nothing else takes any."""
    del fake_jobs.CLOCK[1:]
    for module in (sweep, attempts):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: sum(fake_jobs.CLOCK)))


@pytest.mark.parametrize(
    "text, seconds", [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("1h 5s", 3605), (12, 12), ("1.5h", 5400), ("7", 7)]
)
def test_a_budget_is_read_as_people_write_it(text, seconds):
    assert sweep.parse_budget(text) == seconds


def test_no_budget_is_without_end():
    assert sweep.parse_budget(None) == math.inf


@pytest.mark.parametrize("text", ["", "0", "-5", "30x", "m", "inf", "nan", "30m1h", True, "0s"])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="budget must be a time above 0 such as 30m"):
        sweep.parse_budget(text)


def test_no_job_is_started_that_would_not_fit_by_what_jobs_took_so_far(tmp_path, clock):
    values = plan(base={"cost": 10}, axes={"a": [1, 2, 3, 4, 5]})
    found = sweep.run(values, tmp_path / "s", budget=35)  # begun at 0, 10 and 20; at 30 another 10 would be 40
    assert (found["done"], found["missing"], found["ended"], found["seconds"]) == (3, 2, "budget", 30.0)


def test_one_job_is_always_tried_also_where_it_is_known_not_to_fit(tmp_path, clock):
    values = plan(base={"cost": 10}, axes={"a": [1, 2, 3]})
    assert [sweep.run(values, tmp_path / "s", budget="1s")["done"] for _ in range(3)] == [1, 2, 3]


def test_cheaper_jobs_still_fit_where_a_dear_one_does_not(tmp_path, clock):
    values = plan(axes={"cost": [1, 50], "a": [1, 2, 3, 4]}, order_seed=3)  # a cheap one is measured first
    sweep.run(values, tmp_path / "s", budget=60)
    costs = [state.run_dir for state in states(tmp_path / "s").values() if state.run_dir]
    taken = [row["cost"] for row in sweep.results(tmp_path / "s") if row["status"] == "finished"]
    assert costs and sorted(taken) == [1, 1, 1, 1, 50]


def test_the_time_left_is_the_measured_cost_of_the_jobs_that_wait(tmp_path, clock):
    said = []
    sweep.run(plan(base={"cost": 10}, axes={"a": [1, 2, 3]}), tmp_path / "s", progress=said.append)
    ended = [(now["done"], now["total"], now["seconds_left"]) for now in said if now["stage"] == "job ended"]
    assert ended == [(1, 3, 20.0), (2, 3, 10.0), (3, 3, 0.0)]
    assert said[0]["seconds_left"] is None  # nothing was measured yet
    assert [now["stage"] for now in said[:3]] == ["job started", "adding", "job ended"]
    assert len({now["job"] for now in said}) == 3


def test_what_was_measured_before_a_restart_still_counts(tmp_path, clock):
    values = plan(base={"cost": 10}, axes={"a": [1, 2, 3]})
    sweep.run(values, tmp_path / "s", budget=5)
    said = []
    sweep.run(values, tmp_path / "s", progress=said.append)
    assert said[0]["seconds_left"] == 10.0


def test_the_frozen_plan_holds_the_plan_its_rows_and_its_jobs(tmp_path):
    sweep.run(plan(**FOUR), tmp_path / "s")
    record = read_json(tmp_path / "s" / "plan.json")
    assert record["plan"]["axes"] == FOUR["axes"] and len(record["rows"]) == 4 == len(record["jobs"])


def test_what_other_processes_do_meanwhile_counts_as_done_and_sets_the_pace(tmp_path, clock):
    values, said = plan(axes={"a": [1, 2, 3, 4, 5, 6]}, base={"cost": 10}), []

    def hear(now: dict) -> None:
        said.append(now)
        if now["stage"] == "job ended" and now["done"] == 1:
            tried = 0
            for row in range(1, 7):  # two of those that are left, as another worker would
                tried += sweep.run(values, tmp_path / "s", only=row)["tried"] if tried < 2 else 0

    sweep.run(values, tmp_path / "s", progress=hear)
    ends = [now for now in said if now["stage"] == "job ended"]
    assert [now["done"] for now in ends] == [1, 4, 5, 6] and {now["total"] for now in ends} == {6}
    assert ends[1]["seconds_left"] == pytest.approx(40 / 4 * 2)  # four jobs of 10 s by this clock, two are left
