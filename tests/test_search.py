"""Does a search ask for what it should, stop what is behind, and go on after a kill as if there had been none?"""

from __future__ import annotations

import json
import os
import signal

import fake_jobs
import pytest
from fake_jobs import plan, process, statuses
from typer.testing import CliRunner

from nbhelpers import attempts, cli, grid, journal, search, sweep
from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.ledger import Ledger
from nbhelpers.runs import read_run
from nbhelpers.search import Search, Trial

SPACE = {"a": {"low": 0, "high": 9}, "b": {"low": 0, "high": 1}}
WANTED = {"metric": "total", "direction": "minimize", "trials": 8, "startup_trials": 3, "space": SPACE}


def wanted(**changes) -> dict:
    """A plan of a search, with changes in its section."""
    base = changes.pop("base", {})
    return plan(base=base, search=WANTED | changes)


def asked(folder) -> list[tuple]:
    """(a, b) of every trial, in order."""
    return [(row.values["a"], row.values["b"]) for row in Ledger(folder).rows]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sampler": "tpee"}, "unknown sampler 'tpee'. Did you mean 'tpe'"),
        ({"pruner": "median"}, "unknown pruner 'median'"),
        ({"pruner": "successive_halving"}, "successive_halving needs the steps after which"),
        ({"first_rung": 3}, "pruner 'none' does not go with first_rung 3"),
        ({"direction": "down"}, "search.direction must be 'minimize' or 'maximize', got 'down'"),
        ({"trial": 3}, "unknown field 'trial'. Did you mean 'trials'"),
        ({"space": {}}, "search.space"),
        ({"space": {"c": {"choices": [1]}}}, "unknown field 'c'"),
        ({"space": {"a": {"low": 0}}}, "space 'a' needs low and high, or choices, got {'low': 0.0"),
        ({"space": {"a": {"low": 0, "high": 3, "choices": [1]}}}, "space 'a' needs low and high, or choices"),
        ({"space": {"a": {"low": 3, "high": 3}}}, "space 'a' needs low below high, got low 3 and high 3"),
        ({"space": {"b": {"low": 0, "high": 1, "log": True}}}, "space 'b' with log needs low above 0, got 0"),
        ({"space": {"a": {"low": 0.5, "high": 3}}}, "space 'a' takes whole numbers, got low 0.5"),
        ({"space": {"what": {"low": 0, "high": 3}}}, "space 'what' is no number, so it has no low and high"),
        ({"space": {"b": {"low": 0, "high": 3}}}, "axis 'b', value 3.0: b must be less than or equal to 1"),
        ({"space": {"a": {"choices": [1, 101]}}}, "axis 'a', value 101: a must be less than or equal to 100"),
        ({"base": {"a": 1}}, "field 'a' stands in axes and in base"),
    ],
)
def test_what_is_wrong_with_a_search_is_said_before_anything_runs(changes, said):
    with pytest.raises((ValueError, LookupError), match=said) as caught:
        grid.expand(grid.read_plan(wanted(**changes)))
    assert "\n" not in str(caught.value)


def test_a_search_takes_the_place_of_axes():
    with pytest.raises(ValueError, match="search takes the place of seeds"):
        grid.expand(grid.read_plan(wanted() | {"seeds": [0, 1]}))


def test_a_metric_that_no_run_of_the_kind_has_is_refused_with_the_known_ones():
    values = {"kind": "fine_tuning", "search": WANTED | {"space": {"lora_rank": {"choices": [2, 4]}}}}
    with pytest.raises(LookupError, match="unknown metric 'total'.*fine_tuned_perplexity"):
        grid.expand(grid.read_plan(values))


def test_without_optuna_there_is_one_line_with_the_command_and_no_folder(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(search, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs Optuna.*pip install 'nbhelpers\[search\]'"):
        sweep.run(wanted(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_nothing_of_optuna_is_imported_before_a_search_runs(tmp_path):
    code = "import sys; from nbhelpers import sweep; sys.exit('optuna' in sys.modules)"
    assert os.spawnlp(os.P_WAIT, os.sys.executable, os.sys.executable, "-c", code) == 0


# ------------------------------------------------------------------------------------------------ asking and telling


@pytest.fixture(scope="module", autouse=True)
def optuna():
    return pytest.importorskip("optuna")


def question(**changes) -> Search:
    return Search(**WANTED | changes)


def test_every_trial_lies_in_the_space_and_whole_numbers_stay_whole(tmp_path):
    found = sweep.run(wanted(), tmp_path / "s")
    assert (found["planned"], found["done"], found["missing"], found["ended"]) == (8, 8, 0, "done")
    assert all(isinstance(a, int) and 0 <= a <= 9 and 0 <= b <= 1 for a, b in asked(tmp_path / "s"))


def test_the_same_search_asks_for_the_same_trials_and_another_seed_for_others(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        sweep.run(wanted(seed=seed), tmp_path / name)
    assert asked(tmp_path / "one") == asked(tmp_path / "two") != asked(tmp_path / "other")


def test_tpe_looks_where_it_was_good_and_random_does_not(tmp_path):
    """The minimum is at 0: of the ten trials after ten at random, tpe's lie lower on average."""
    means = {}
    for sampler in ("tpe", "random"):
        sweep.run(wanted(sampler=sampler, trials=20, startup_trials=10), tmp_path / sampler)
        late = asked(tmp_path / sampler)[10:]
        means[sampler] = sum(a + b for a, b in late) / len(late)
    assert means["tpe"] < 2.5 < means["random"]


def test_what_is_maximised_is_sought_above(tmp_path):
    sweep.run(wanted(direction="maximize", trials=20, startup_trials=10), tmp_path / "s")
    late = asked(tmp_path / "s")[10:]
    assert sum(a for a, _ in late) / len(late) > 6


def test_the_best_trial_is_the_one_with_the_least_total_and_status_shows_it(tmp_path):
    sweep.run(wanted(), tmp_path / "s")
    totals = [a + b for a, b in asked(tmp_path / "s")]
    best = sweep.status(tmp_path / "s")["best"]
    assert (best["value"], best["trial"]) == (min(totals), totals.index(min(totals)))
    assert read_run(best["run_dir"]).result["total"] == best["value"]


def test_best_looks_at_the_direction_and_at_trials_that_came_to_their_end():
    found = [Trial({}, "finished", value) for value in (2.0, 1.0, 3.0, float("nan"), None)]
    found += [Trial({}, "pruned"), Trial({}, "failed"), Trial({}, "running"), Trial({}, "finished", 1.0)]
    assert search.best(question(), found) == 1 and search.best(question(direction="maximize"), found) == 2
    assert search.best(question(), found[5:8]) is None


def test_values_that_are_proposed_twice_are_one_job_and_the_second_trial_is_an_alias(tmp_path):
    found = sweep.run(wanted(space={"a": {"choices": [1, 2]}}, trials=6), tmp_path / "s")
    assert (found["rows"], found["planned"], found["aliases"], found["done"]) == (6, 2, 4, 2)
    assert len(statuses(tmp_path / "s")) == 2


def test_choices_keep_their_types(tmp_path):
    sweep.run(wanted(space={"what": {"choices": ["fine", "nan"]}, "log": {"choices": [None]}}), tmp_path / "s")
    rows = sweep.results(tmp_path / "s")
    assert {row["log"] for row in rows} == {None} and {row["what"] for row in rows} == {"fine", "nan"}


def test_a_metric_that_the_results_do_not_have_is_named_with_those_that_they_have(tmp_path):
    with pytest.raises(LookupError, match="unknown metric 'totl'. Did you mean 'total'"):
        sweep.run(wanted(metric="totl"), tmp_path / "s")


def test_a_trial_that_fails_is_recorded_with_its_class_and_the_search_goes_on(tmp_path):
    space = {"what": {"choices": ["fine", "oom", "diverge", "bug"]}, "b": {"low": 0, "high": 1}}
    found = sweep.run(wanted(space=space, sampler="random", trials=12), tmp_path / "s")
    classes = found["failed_by_class"]
    assert found["planned"] == 12 == found["done"] + found["failed"] and found["done"] and classes["out of memory"]
    assert sweep.status(tmp_path / "s")["best"]["values"]["what"] == "fine"


def test_tpe_keeps_away_from_where_runs_diverged():
    space = {"b": {"low": 0, "high": 1}}
    told = [Trial({"b": n / 20}, "diverged" if n >= 10 else "finished", 1.0) for n in range(20)]
    found = [search.next_values(question(space=space, seed=seed), set(), told)["b"] for seed in range(10)]
    assert sum(b < 0.5 for b in found) >= 9


# ------------------------------------------------------------------------------------------------ budget, stop, kill


def test_a_search_keeps_to_its_budget_and_goes_on_in_the_next_run(tmp_path, monkeypatch):
    from types import SimpleNamespace

    del fake_jobs.CLOCK[1:]
    for module in (sweep, attempts):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: sum(fake_jobs.CLOCK)))
    values = wanted(base={"cost": 10})
    found = sweep.run(values, tmp_path / "s", budget=35)
    assert (found["rows"], found["done"], found["missing"], found["ended"]) == (3, 3, 5, "budget")
    said = []
    found = sweep.run(values, tmp_path / "s", progress=said.append)
    assert (found["tried"], found["done"], found["ended"]) == (5, 8, "done")
    assert (said[0]["total"], said[0]["seconds_left"]) == (8, 40.0)


def test_a_search_stopped_or_killed_goes_on_with_the_trials_of_one_that_was_not(tmp_path):
    values = wanted()
    sweep.run(values, tmp_path / "whole")
    stop = iter([False] * 5)
    assert sweep.run(values, tmp_path / "stopped", should_stop=lambda: next(stop, True))["ended"] == "stopped"
    for folder, moments in (("stopped", []), ("killed", ["2 middle", "3 after", "1 before"])):
        for moment in moments:
            killed = process(tmp_path / folder, values, moment)
            assert (killed.communicate(), killed.returncode)[1] == -signal.SIGKILL
        found = sweep.run(values, tmp_path / folder)
        assert (found["done"], found["missing"], found["failed"], found["aliases"]) == (8, 0, 0, 0)
        assert asked(tmp_path / folder) == asked(tmp_path / "whole")
        assert statuses(tmp_path / folder).count("finished") == 8


def test_two_processes_share_a_search_and_do_no_trial_twice(tmp_path):
    log = str(tmp_path / "log")
    values = wanted(base={"log": log, "cost": 0.05})
    both = [process(tmp_path / "s", values) for _ in range(2)]
    errors = [one.communicate()[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], errors
    assert len(fake_jobs.done(log)) == 8 == len(set(fake_jobs.done(log)))
    assert sweep.status(tmp_path / "s")["done"] == 8 == len(asked(tmp_path / "s"))


def test_more_trials_are_added_to_a_search_and_another_search_is_refused_its_folder(tmp_path):
    sweep.run(wanted(trials=3), tmp_path / "s")
    before = asked(tmp_path / "s")
    assert sweep.run(wanted(trials=5), tmp_path / "s")["tried"] == 2
    assert asked(tmp_path / "s")[:3] == before
    for other in (wanted(metric="a"), wanted(base={"cost": 2.0}), plan(axes={"a": [1]})):
        with pytest.raises(ValueError, match="holds trials of another search"):
            sweep.run(other, tmp_path / "s")
    assert sweep.run(wanted(trials=5), tmp_path / "s")["tried"] == 0


def test_trials_on_record_stay_also_where_they_would_be_asked_for_otherwise_today(tmp_path, monkeypatch):
    sweep.run(wanted(trials=3), tmp_path / "s")
    before = asked(tmp_path / "s")
    monkeypatch.setattr(search, "next_values", lambda *_: {"a": 7, "b": 0.5})
    assert sweep.run(wanted(trials=4), tmp_path / "s")["tried"] == 1
    assert asked(tmp_path / "s") == [*before, (7, 0.5)]


def test_a_search_whose_data_changed_in_their_place_is_refused(tmp_path, monkeypatch):
    sweep.run(wanted(trials=2), tmp_path / "s")
    kind = grid.KINDS["fake"]()
    monkeypatch.setitem(
        grid.KINDS._entries,
        "fake",
        lambda: grid.JobKind(**vars(kind) | {"fingerprint": lambda config: {"text": "new"}}),
    )
    with pytest.raises(ValueError, match="model or data were others when trial 0"):
        sweep.run(wanted(trials=3), tmp_path / "s")


def test_trials_that_are_done_again_come_in_the_order_in_which_they_were_asked_for(tmp_path):
    values, begun = wanted(base={"what": "bug"}), []
    sweep.run(values, tmp_path / "s")
    assert len(sweep.retry(tmp_path / "s")) == 8
    sweep.run(values, tmp_path / "s", progress=lambda now: now["stage"] == "job started" and begun.append(now["job"]))
    assert begun == [row.job for row in Ledger(tmp_path / "s").rows]


def test_nothing_but_the_ledgers_own_files_is_kept(tmp_path):
    sweep.run(wanted(trials=2), tmp_path / "s")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"plan.json", "ledger.jsonl", "leases", "runs"}


# ------------------------------------------------------------------------------------------------ successive halving

# What run reports is a + b / step: at step 3 a run with a = 0 is before all others.
HALVING = {"pruner": "successive_halving", "first_rung": 3, "reduction_factor": 2, "sampler": "random"}


def test_runs_that_are_behind_at_a_rung_are_stopped_and_are_no_failures(tmp_path):
    found = sweep.run(wanted(base={"steps": 5}, **HALVING), tmp_path / "s")
    assert found["planned"] == 8 == found["done"] + found["pruned"] and found["failed"] == 0 and found["pruned"] >= 3
    losses = [a + b / 3 for a, b in asked(tmp_path / "s")]  # at the rung, by trial
    stopped = [state.status == "pruned" for state in Ledger(tmp_path / "s").states().values()]
    for number, loss in enumerate(losses):  # with a pencil: the best half of those that came to step 3 so far
        rank = sorted(losses[: number + 1]).index(loss)
        assert stopped[number] == (rank > max(0, (number + 1) // 2 - 1))


def test_a_stopped_run_keeps_its_numbers_and_says_why(tmp_path):
    sweep.run(wanted(base={"steps": 5}, **HALVING), tmp_path / "s")
    state = next(s for s in Ledger(tmp_path / "s").states().values() if s.status == "pruned")
    run = read_run(state.run_dir)
    assert run.curve("val_loss", "fake")[0] == [1, 2, 3] and run.status == "interrupted"
    (error,) = [event for event in run.events if event["kind"] == "error"]
    assert "stopped by the search after step 3: validation loss" in error["message"]
    assert sweep.run(wanted(base={"steps": 5}, **HALVING), tmp_path / "s")["tried"] == 0
    assert sweep.retry(tmp_path / "s") == []


def test_a_ledger_that_lost_its_lines_still_knows_who_was_stopped(tmp_path):
    found = sweep.run(wanted(base={"steps": 5}, **HALVING), tmp_path / "s")
    (tmp_path / "s" / "ledger.jsonl").unlink()
    assert sweep.status(tmp_path / "s")["pruned"] == found["pruned"] > 0


def test_a_stopped_trial_is_not_missing_in_the_journal(tmp_path):
    found = sweep.run(wanted(base={"steps": 5}, **HALVING), tmp_path / "s")
    runs = ExperimentAnalyzer(tmp_path / "s" / "runs").load_all()
    assert found["pruned"] and journal.missing_jobs(tmp_path / "s", runs) == []


def test_a_search_with_a_pruner_that_was_killed_stops_the_same_runs(tmp_path):
    values = wanted(base={"steps": 5}, **HALVING)
    sweep.run(values, tmp_path / "whole")
    for moment in ("3 middle", "2 before"):
        process(tmp_path / "killed", values, moment).communicate()
    sweep.run(values, tmp_path / "killed")
    both = [[s.status for s in Ledger(tmp_path / name).states().values()] for name in ("whole", "killed")]
    assert both[0] == both[1] and asked(tmp_path / "whole") == asked(tmp_path / "killed")


def test_a_pruner_is_refused_where_a_job_says_nothing_on_its_way(monkeypatch):
    kind = grid.KINDS["fake"]()
    monkeypatch.setitem(grid.KINDS._entries, "fake", lambda: grid.JobKind(**vars(kind) | {"heard": None}))
    with pytest.raises(ValueError, match="pruner 'successive_halving' hears nothing from 'fake' jobs"):
        grid.expand(grid.read_plan(wanted(**HALVING)))


def test_a_run_that_goes_on_after_a_kill_is_judged_with_what_it_had_reported():
    watch = search.Watch(
        question(**HALVING), {"a"}, [Trial({"a": 0, "b": 0.0}, "finished", 0.0, ((3, 0.0),))] * 3, {"a": 5, "b": 0.5}
    )
    assert watch.hear(2, 5.25, [(1, 5.5), (2, 9.0), (3, 9.0)]) is None and watch.told == {1, 2}
    assert "after step 3" in watch.hear(3, 5.1)


# ------------------------------------------------------------------------------------------------ commands


def call(*arguments: object):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build(words), words)


def test_the_commands_plan_run_and_show_a_search(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(wanted(base={"steps": 5}, **HALVING)))
    assert "8 trials by random over a, b: minimize total" in call("sweep", "plan", path).stdout
    result = call("sweep", "run", path, "--out", tmp_path / "s")
    assert result.exit_code == 0 and "stopped by the search" in result.stdout
    shown = call("sweep", "status", tmp_path / "s").stdout
    assert "best: trial " in shown and "total " in shown and "with a=" in shown
    assert json.loads(call("sweep", "status", tmp_path / "s", "--json").stdout)["best"]["metric"] == "total"


def test_a_search_without_an_end_so_far_says_so(tmp_path):
    sweep.run(wanted(base={"what": "bug"}, trials=1), tmp_path / "s")
    assert "best: no trial came to its end yet" in call("sweep", "status", tmp_path / "s").stdout
