"""Does a plan become exactly the jobs it says, and does it refuse nonsense in one line before anything runs?"""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from fake_jobs import FakeConfig, plan

from nbhelpers import grid
from nbhelpers.grid import Job, Plan, expand, read_plan, spread
from nbhelpers.records import sha256_json


def expansion(**values) -> grid.Expansion:
    return expand(read_plan(plan(**values)))


# ------------------------------------------------------------------------------------------------ rows, jobs, ids


def test_two_axes_of_two_and_three_values_with_two_seeds_are_twelve_jobs():
    found = expansion(base={"what": "fine"}, axes={"a": [1, 2], "b": [0.1, 0.2, 0.3]}, seeds=[0, 1])
    assert (len(found.rows), len(found.jobs), found.aliases) == (12, 12, 0)
    assert {(j.config["a"], j.config["b"], j.config["seed"]) for j in found.jobs.values()} == set(
        itertools.product([1, 2], [0.1, 0.2, 0.3], [0, 1])
    )


def test_a_plan_without_axes_is_one_job():
    assert len(expansion().jobs) == 1


def test_a_job_id_is_the_sha256_of_kind_format_config_and_data():
    (job,) = expansion(base={"a": 3}).jobs.values()
    config = {"a": 3, "b": 0.0, "what": "fine", "cost": 1.0, "log": None, "seed": 0, "steps": 0}
    assert job.sha256 == sha256_json({"kind": "fake", "format": 1, "config": config, "data": {}})
    assert job.id == job.sha256[:16]


def test_a_default_written_out_is_the_same_job_as_one_left_out():
    assert expansion(base={"a": 0}).jobs.keys() == expansion().jobs.keys()


def test_a_name_does_not_make_another_job_but_data_and_code_format_do(monkeypatch):
    def kind(**more):
        return lambda: grid.JobKind(config=FakeConfig, run=None, **more)

    ids = [next(iter(expansion().jobs)), next(iter(expansion(base={"name": "other"}).jobs))]
    for more in ({"format": 2}, {"fingerprint": lambda config: {"text": "abc"}}):
        monkeypatch.setitem(grid.KINDS._entries, "fake", kind(**more))
        ids.append(next(iter(expansion().jobs)))
    assert ids[0] == ids[1] and len(set(ids)) == 3


def test_rows_where_a_rule_says_that_an_axis_does_not_matter_are_aliases_of_the_first():
    classic = {
        "axes": {"what": ["u", "s", "r"], "b": [n / 10 for n in range(10)], "a": [0, 1]},
        "aliases": [{"when": {"b": 0}, "ignore": ["what", "a"]}],
    }
    found = expansion(**classic)  # 60 rows; at b = 0 six rows are one job
    assert (len(found.rows), len(found.jobs), found.aliases) == (60, 55, 5)
    assert {row.values["b"] for row in found.rows if row.alias} == {0.0}
    assert [row.alias for row in found.rows][:2] == [False, True]


def test_the_classic_plan_of_360_rows_is_330_jobs_and_30_aliases():
    axes = {"cost": [1, 2], "log": ["x", "y", "z"], "what": ["u", "s", "r"], "b": [n / 10 for n in range(10)]}
    found = expansion(axes=axes | {"a": [0, 1]}, aliases=[{"when": {"b": 0}, "ignore": ["what", "a"]}])
    assert (len(found.rows), len(found.jobs), found.aliases) == (360, 330, 30)


def test_an_axis_may_be_named_values_of_several_fields():
    named = {"low": {"a": 1, "what": "u"}, "high": {"a": 9, "what": "s"}}
    found = expansion(axes={"method": named, "b": [0.0, 0.5]}, aliases=[{"when": {"b": 0.0}, "ignore": ["method"]}])
    assert [(row.values["method"], row.values["b"], row.alias) for row in found.rows] == [
        *(("low", 0.0, False), ("low", 0.5, False)),
        *(("high", 0.0, True), ("high", 0.5, False)),
    ]
    configs = [found.jobs[row.job].config for row in found.rows]
    assert [(config["a"], config["what"]) for config in configs] == [(1, "u"), (1, "u"), (1, "u"), (9, "s")]
    same = expansion(axes={"a": [9]}, base={"b": 0.5, "what": "s"})
    assert next(iter(same.jobs)) == found.rows[-1].job, "what counts is the config, not how it was written"
    assert found.jobs[found.rows[-1].job].name == "high b 0.5"


def test_a_run_is_called_by_its_place_on_the_axes_unless_the_plan_names_it():
    assert [j.config["name"] for j in expansion(axes={"what": ["fine"], "a": [1]}).jobs.values()] == ["fine a 1"]
    assert [j.config["name"] for j in expansion(base={"name": "n"}, axes={"a": [1]}).jobs.values()] == ["n"]


# ------------------------------------------------------------------------------------------------ files


def test_yaml_json_and_dict_give_the_same_plan(tmp_path):
    values = plan(axes={"a": [1, 2]}, seeds=[0, 1])
    (tmp_path / "p.yaml").write_text("kind: fake\naxes: {a: [1, 2]}\nseeds: [0, 1]\n")
    (tmp_path / "p.json").write_text(json.dumps(values))
    assert read_plan(tmp_path / "p.yaml") == read_plan(tmp_path / "p.json") == read_plan(values)


@pytest.mark.parametrize(
    "text, said",
    [
        ("kind: [fake", r"is not valid YAML \(line 1, column 12\)"),
        ("- kind", "must be a mapping with kind, base and axes, got list"),
        ("", "must be a mapping with kind, base and axes, got NoneType"),
        ("kind: fake\nkind: other", r"\(line 2, column 1\): 'kind' stands there twice"),
        ("kind: &k fake\nname: *k", r"references \(\*name\) are not read"),
        ("kind: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("kind: fake\nseed: [1]", "unknown plan field 'seed'. Did you mean 'seeds'"),
        ("base: {}", "kind Field required"),
        ("kind: fake\naxes: [a]", "axes must be a valid dictionary"),
        ("kind: fake\naxes: {a: 3}", "axis 'a' must be a list of values"),
        ("kind: fake\nseeds: [x]", "seeds.0 must be a valid integer"),
        ("kind: fake\naliases: [{when: {}, ignore: [a]}]", "aliases.0.when"),
        ("? [a, b]\n: 1", "a name must be a word"),
        ("a" * 3 + "\0", "is not valid YAML"),
        ("[" * 1500, "cannot be read"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_line(text, said, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_plan(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value) and "p.yaml" in str(caught.value)


def test_a_plan_that_is_not_there_or_not_text_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="p.yaml"):
        read_plan(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read"):
        read_plan(tmp_path / "p.yaml")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ValueError, match=r"p.json' cannot be read"):
        read_plan(tmp_path / "p.json")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "values, said",
    [
        ({"kind": "fak"}, "unknown job kind 'fak'. Did you mean 'fake'"),
        ({"axes": {"cots": [1]}}, "axes: unknown field 'cots'. Did you mean 'cost'"),
        ({"base": {"sed": 1}}, "base: unknown field 'sed'. Did you mean 'seed'"),
        ({"axes": {"a": []}}, "axis 'a' has no values"),
        ({"seeds": []}, "axis 'seed' has no values"),
        ({"axes": {"a": [1, 2, 1]}}, "axis 'a' has 1 twice"),
        ({"axes": {"a": [1, 1.0]}}, "axis 'a' has 1.0 twice"),
        ({"axes": {"b": [0.1, 1.5]}}, "axis 'b', value 1.5: b must be less than or equal to 1, got 1.5"),
        ({"axes": {"a": [1, "x"]}}, "axis 'a', value 'x': a must be a valid integer"),
        ({"axes": {"a": [1]}, "base": {"a": 2}}, "field 'a' stands in axes and in base"),
        ({"axes": {"seed": [1]}, "seeds": [2]}, "field 'seed' stands in axes and in seeds"),
        ({"base": {"b": 7}}, "base: b must be less than or equal to 1, got 7"),
        ({"axes": {"a": [1]}, "aliases": [{"when": {"b": 0}, "ignore": ["a"]}]}, "aliases: unknown axis 'b'"),
        ({"aliases": [{"when": {"bb": 0}, "ignore": ["a"]}]}, "aliases: unknown axis 'bb'"),
        ({"axes": {"a": {"x": {"b": 1}}}}, "axis 'a' is a field, so its values are a list"),
        ({"axes": {"a": {"x": {"a": 1, "b": 1}}}}, "or let each set 'a' to its own name"),
        (
            {"axes": {"m": {"x": {"a": 1}, "y": {"b": 1}}}},
            "axis 'm', value 'y' sets b: each value sets the same fields",
        ),
        ({"axes": {"m": {"x": {}}}}, "axis 'm', value 'x' sets nothing"),
        ({"axes": {"m": {"x": {"aa": 1}}}}, "axes: unknown field 'aa'"),
        ({"axes": {"m": {"x": {"a": 1}}, "a": [1]}}, "field 'a' is set by two axes"),
        ({"axes": {"m": {"x": {"a": 1}}}, "base": {"a": 1}}, "field 'a' stands in axes and in base"),
        ({"axes": {"m": {"x": {"b": 7}}}}, "axis 'm', value 'x': b must be less than or equal to 1, got 7"),
        ({"axes": {"m": {"x": {"a": 1}, "y": {"a": 1}}}}, "axis 'm' has 'y' twice"),
        ({"axes": {"a": list(range(101)), "cost": list(range(1000))}}, "at most 100000 rows, got 101000"),
    ],
)
def test_what_is_wrong_is_said_with_its_name_and_value(values, said):
    with pytest.raises((ValueError, LookupError), match=said) as caught:
        expansion(**values)
    assert "\n" not in str(caught.value)


def test_all_wrong_values_of_an_axis_are_said_at_once():
    with pytest.raises(ValueError, match="value 2: .*; axis 'b', value 3: "):
        expansion(axes={"b": [2, 3]})


def test_values_that_are_wrong_only_together_name_their_row(monkeypatch):
    class Together(FakeConfig):
        def model_post_init(self, _context) -> None:
            if self.a == 2 and self.b == 0.5:
                raise ValueError("a 2 and b 0.5 do not go together")

    monkeypatch.setitem(grid.KINDS._entries, "fake", lambda: grid.JobKind(config=Together, run=None))
    with pytest.raises(ValueError, match=r"a=2, b=0.5.*do not go together"):
        expansion(axes={"a": [1, 2], "b": [0.1, 0.5]})


# ------------------------------------------------------------------------------------------------ order


def jobs(*sizes: int) -> list[Job]:
    cells = itertools.product(*map(range, sizes))
    return [Job(f"{n:05}", "", {}, {f"axis{at}": v for at, v in enumerate(cell)}) for n, cell in enumerate(cells)]


def widest(order: list[Job]) -> int:
    """Over all beginnings and axes: how often the commonest value was taken more than the rarest."""
    counts = {name: Counter({job.values[name]: 0 for job in order}) for name in order[0].values}
    worst = 0
    for job in order:
        for name, count in counts.items():
            count[job.values[name]] += 1
            worst = max(worst, max(count.values()) - min(count.values()))
    return worst


@pytest.mark.parametrize("sizes", [(2, 4, 3, 2), (4, 4), (3, 3, 3), (5, 2, 7), (2, 3, 3, 10, 2)])
def test_in_every_beginning_no_value_of_an_axis_is_more_than_two_ahead_of_another(sizes):
    grid_of_jobs = jobs(*sizes)
    order = spread(grid_of_jobs, seed=1)
    assert widest(order) <= 2 < widest(grid_of_jobs)
    assert sorted(job.id for job in order) == [job.id for job in grid_of_jobs]


def test_the_first_four_jobs_of_two_by_four_hold_every_value():
    order = spread(jobs(2, 4), seed=0)[:4]
    assert {job.values["axis1"] for job in order} == {0, 1, 2, 3} and {job.values["axis0"] for job in order} == {0, 1}


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    some = jobs(2, 4, 3)
    assert spread(some, 3) == spread(some[::-1], 3) != spread(some, 4)


def test_a_plan_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Plan(kind="fake").name = "x"
