"""Is a user's table of results matched cell by cell, refused where it says too little, and is nothing left unsaid?"""

from __future__ import annotations

import typing

import pytest
from sparsity_grid import full_grid

from nbhelpers import external_results
from nbhelpers.external_results import compared, counts, parse_columns, read
from nbhelpers.sparsity import SparsityConfig

HEADER = "model,task,method,sparsity,mode,value,protocol\n"


def table(tmp_path, text: str, columns=None, protocol=None):
    path = tmp_path / "theirs.csv"
    path.write_text(text, encoding="utf-8")
    return read(path, columns, protocol)


def own(model="tiny-llama", task="boolq"):
    return [row for row in full_grid() if (row.model, row.task) == (model, task)]


def test_columns_of_any_name_percent_and_short_modes_are_read_as_ours(tmp_path):
    text = "Net,Data,How,Zeros (%),Kind,Acc\nm,t,wanda,50,s2d,71.5\nm,t,wanda,60,Sparse-to-sparse,70\n"
    columns = "Net=model, Data=task, How=method, Zeros (%)=sparsity_percent, Kind=mode, Acc=value_percent"
    found = table(tmp_path, text, columns, "0 shots")
    assert found["keys"] == ["model", "task", "method", "sparsity", "mode"] and found["source"] == "theirs.csv"
    told = {"model": "m", "task": "t", "method": "wanda", "protocol": "0 shots"}
    assert found["rows"] == [
        told | {"sparsity": 0.5, "mode": "sparse_to_dense", "value": 0.715, "line": 2},
        told | {"sparsity": 0.6, "mode": "sparse_to_sparse", "value": 0.7, "line": 3},
    ]


@pytest.mark.parametrize(
    "text, columns, problem",
    [
        ("Modell,sparsity,value,protocol\nm,0,1,p\n", "Model=model", "unknown column 'Model'. Did you mean 'Modell'"),
        (
            "a,sparsity,value,protocol\nm,0,1,p\n",
            "a=modul",
            "unknown name for column 'a' 'modul'. Did you mean 'model'",
        ),
        ("a,sparsity,value,protocol\nm,0,1,p\n", "a", "columns must be THEIRS=OURS"),
        ("a,b,sparsity,value,protocol\nm,m,0,1,p\n", "a=model,b=model", "two columns are mapped to 'model'"),
        ("a,sparsity,value,protocol\nm,0,1,p\n", "a=model,a=task", "column 'a' is mapped twice"),
        ("model,value,protocol\nm,1,p\n", None, "one column must be 'sparsity'"),
        ("model,sparsity,protocol\nm,0,p\n", None, "one column must be 'value'"),
        ("sparsity,value,protocol\n0,good,p\n", None, "line 2, column 'value': 'good' is not a number"),
        ("sparsity,value,protocol\n0,71.5,p\n", None, "must be from 0 to 1, got 71.5: map the column to the name that"),
        ("sparsity,value,protocol\n0,nan,p\n", None, "must be from 0 to 1, got nan"),
        ("sparsity,value,protocol\n0,,p\n", None, "'' is not a number"),
        ("sparsity,value,seed,protocol\n0,1,one,p\n", None, "a seed is a whole number, got 'one'"),
        ("sparsity,value,protocol\n0,1,p\n0.0,0.9,p\n", None, r"lines 2 and 3 are of one cell \(sparsity 0.0\)"),
        ("sparsity,value\n0,1\n", None, "does not say how its numbers were measured"),
        ("sparsity,value,protocol\n0,1,p\n0.5,1,\n", None, "line 3 names no protocol"),
        ("sparsity,value,protocol\n", None, "has no rows below its header"),
        ("sparsity;value;protocol\n0;1;p\n", None, "semicolons"),
        ("", "Acc=value", "theirs.csv' is empty: name a table with a header and results"),
        (" \n\n", None, "theirs.csv' is empty: name a table"),
        (
            "sparsity,Kind,value,protocol\n0.5,s2s,1,p\n0.6,sparse,1,p\n",
            "Kind=mode",
            "line 3, column 'Kind': unknown mode 'sparse'. Available: dense, sparse_to_sparse,",
        ),
    ],
)
def test_a_table_that_cannot_be_compared_is_refused_with_the_way_out(tmp_path, text, columns, problem):
    with pytest.raises((ValueError, LookupError), match=problem):
        table(tmp_path, text, columns)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"model,value\n\xe9,1\n")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read(tmp_path / "x.csv")


def test_a_column_name_may_hold_an_equals_sign_and_blanks():
    assert parse_columns(" a = b = value ,c=task,") == {"a = b": "value", "c": "task"}


def test_theirs_stands_beside_ours_with_the_difference_and_our_interval(tmp_path):
    ours = own()
    row = next(one for one in ours if (one.method, one.sparsity, one.mode) == ("random", 0.5, "sparse_to_sparse"))
    inside, outside = (row.tuned + row.tuned_high) / 2, row.tuned_high + 0.01
    for value, expected in ((inside, False), (outside, True), (row.tuned_low - 0.01, True)):
        text = HEADER + f"tiny-llama,BoolQ,random,0.5,s2s,{value},5 shots\n"
        (beside,) = compared(ours, table(tmp_path, text))["rows"]
        assert (beside["row"], beside["ours"], beside["outside"]) == (row.row, row.tuned, expected)
        assert beside["difference"] == pytest.approx(row.tuned - value)
        assert beside["their_protocol"] == "5 shots"


def test_what_has_no_partner_is_counted_and_named_on_both_sides(tmp_path):
    text = HEADER + "tiny-llama,boolq,random,0.5,s2s,0.1,p\ntiny-llama,boolq,wanda,0.5,s2s,0.8,p\n"
    found = compared(own(), table(tmp_path, text))
    assert counts(found) == {"matched": 1, "outside": 1, "not_measured": 0, "ours_alone": 54, "theirs_alone": 1}
    said = external_results.said(found)
    assert said[0] == "1 cells of ours stand beside theirs.csv, by model, task, method, sparsity, mode"
    assert "1 of theirs have no partner: line 3 (tiny-llama boolq wanda 0.5 sparse_to_sparse)" in said
    assert any(line.startswith("54 of ours have no partner: tiny-llama boolq unstructured 0 ") for line in said)
    assert said[-1] == "how theirs were measured: p"


def test_the_known_modes_are_those_of_a_cell_and_one_without_zeros_may_call_it_anything(tmp_path):
    own_modes = typing.get_args(SparsityConfig.model_fields["mode"].annotation)
    assert {*external_results.MODES} == {*own_modes}
    assert table(tmp_path, HEADER + "tiny-llama,boolq,none,0,-,0.9,p\n")["rows"][0]["mode"] == "_"


def test_a_column_that_a_table_lacks_fits_all_and_an_empty_cell_too(tmp_path):
    found = compared(own(), table(tmp_path, "task,sparsity,value,protocol\nboolq,0.5,0.8,p\n"))
    assert {(row["method"], row["mode"]) for row in found["rows"]} == {
        (method, mode)
        for method in ("unstructured", "structured", "random")
        for mode in ("sparse_to_dense", "sparse_to_sparse")
    }
    found = compared(own(), table(tmp_path, HEADER + "tiny-llama,boolq,random,0.5,,0.8,p\n"))
    assert sorted(row["mode"] for row in found["rows"]) == ["sparse_to_dense", "sparse_to_sparse"]


def test_at_sparsity_0_method_and_mode_decide_nothing_and_the_dense_run_counts_once(tmp_path):
    found = compared(own(), table(tmp_path, HEADER + "tiny-llama,boolq,none,0,dense,0.9,p\n"))
    assert [row["row"] for row in found["rows"]] == [1] and not found["theirs_alone"]


def test_a_cell_of_ours_that_meets_several_of_their_lines_counts_once(tmp_path):
    dense = next(row for row in own() if row.sparsity == 0)
    ours = [dense.model_copy(update={"tuned": 0.7, "tuned_low": 0.65, "tuned_high": 0.75})]
    lines = [f"tiny-llama,boolq,{method},0,{mode},0.9,p\n" for method in ("random", "wanda") for mode in ("s2s", "s2d")]
    found = compared(ours, table(tmp_path, HEADER + "".join(lines)))
    assert len(found["rows"]) == 4 and counts(found)["outside"] == 1
    told = external_results.said(found)
    assert told[0].startswith("1 cells of ours") and told[1] == "theirs is outside our 95 % interval in 1 of them"
    missing = [dense.model_copy(update=dict.fromkeys(("tuned", "tuned_low", "tuned_high")))]
    found = compared(missing, table(tmp_path, HEADER + "".join(lines)))
    assert "1 of ours are not measured" in external_results.said(found)


def test_sparsities_match_as_numbers_not_as_texts(tmp_path):
    text = "model,task,method,sparsity_percent,mode,value,protocol\ntiny-llama,boolq,random,30,s2s,0.8,p\n"
    ours = [row.model_copy(update={"sparsity": 0.1 + 0.2}) for row in own() if row.sparsity == 0.3]
    assert 0.1 + 0.2 != 0.3 and len(compared(ours, table(tmp_path, text))["rows"]) == 1


def test_a_cell_of_ours_without_a_number_is_matched_and_says_so(tmp_path):
    ours = full_grid(failed={("random", 0.5, "sparse_to_sparse")}, models=("tiny-llama",), tasks=("boolq",))
    found = compared(ours, table(tmp_path, HEADER + "tiny-llama,boolq,random,0.5,s2s,0.8,p\n"))
    (beside,) = found["rows"]
    assert (beside["ours"], beside["difference"], beside["outside"], beside["status"]) == (None, None, None, "diverged")
    assert counts(found)["not_measured"] == 1 and "1 of ours are not measured" in external_results.said(found)


def test_a_column_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("sparsity,value,value,protocol\n0.5,0.9,0.1,p\n")
    with pytest.raises(ValueError, match="has the column 'value' twice: give each a name of its own"):
        external_results.read(tmp_path / "x.csv")
