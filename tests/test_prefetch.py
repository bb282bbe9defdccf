"""Does prefetch bring and hash everything a plan reads, and find on another machine what is missing or differs?"""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from nbhelpers import cli, models, prefetch, records, sparsity, tasks

PLAN = {
    "kind": "sparsity",
    "base": {"model": "tiny-llama", "limit": 8, "steps": 2},
    "axes": {"task": ["boolq", "hellaswag"], "sparsity": [0, 0.5], "mode": ["sparse_to_sparse"]},
    "aliases": [],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose one model lies in a folder here."""
    folder = tmp_path / "cache" / "models--owner--name" / "snapshots" / "0123abc"
    shutil.copytree(models.BUNDLED / "tiny-llama", folder)
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        if repo_id != "owner/name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such entry.\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked, folder


def run(words: list[str]):
    return CliRunner().invoke(cli.build(words), words)


def test_every_model_and_data_set_of_a_plan_is_hashed_once():
    found = prefetch.fetch(PLAN)
    (model,) = found["models"].values()
    folder = models.BUNDLED / "tiny-llama"
    assert model["files"] == {p.name: sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    assert model["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert found["data"]["boolq of bundled, first 8"] == tasks.read("boolq", "bundled", limit=8).sha256
    assert len(found["data"]) == 4, "two tasks, evaluation and training rows of each"


@pytest.mark.parametrize(
    "plan",
    [
        {"kind": "pruning", "base": {"model": "tiny-gpt2"}},
        {"kind": "fine_tuning", "base": {"model": "tiny-gpt2", "control": "tiny-opt"}},
        {"kind": "evaluation", "base": {"model": "tiny-gpt2", "task": "boolq", "data": "bundled"}},
    ],
)
def test_each_kind_of_job_says_what_it_reads(plan):
    found = prefetch.fetch({**plan, "axes": {"seed" if plan["kind"] != "evaluation" else "limit": [1, 2]}})
    assert set(found["models"]) == {v for k, v in plan["base"].items() if k in ("model", "control")}
    assert found["data"] and all(len(value) == 64 for value in found["data"].values())


def test_a_model_of_the_hub_comes_with_its_revision_and_without_code(hub):
    asked, folder = hub
    found = prefetch._model("owner/name")
    assert (found["source"], found["revision"]) == ("hub", "0123abc") and "model.safetensors" in found["files"]
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert not any(Path("modeling.py").match(p) or Path("pytorch_model.bin").match(p) for p in patterns)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="'owner/name' holds no safetensors file"):
        prefetch._model("owner/name")


def test_what_cannot_be_fetched_is_said_by_name_with_the_way_out(hub):
    with pytest.raises(ValueError, match="cannot fetch model 'owner/other': no such entry; .*HF_HOME.*HF_TOKEN") as e:
        prefetch._model("owner/other")
    assert "\n" not in str(e.value)


def test_differences_name_each_file_and_data_set():
    here = {"models": {"m": {"files": {"a": "1" * 64, "b": "2" * 64}}}, "data": {"x": "3" * 64}}
    there = {"models": {"m": {"files": {"a": "1" * 64, "b": "4" * 64, "c": "5" * 64}}, "n": {"files": {"d": "6"}}}}
    assert prefetch.differences(here, here) == []
    assert prefetch.differences(here, {**there, "data": {}}) == [
        "model m: b differs (222222222222 here, 444444444444 in the record)",
        "model m: c is not here",
        "model n: d is not here",
        "data x is not in the record",
    ]


def test_a_node_with_other_files_ends_with_exit_code_1(tmp_path, monkeypatch):
    plan, record = tmp_path / "plan.json", tmp_path / "record.json"
    small = {**PLAN, "axes": {"sparsity": [0, 0.5]}}
    plan.write_text(json.dumps(small))
    assert run(["sweep", "prefetch", str(plan), "--out", str(record)]).exit_code == 0
    same = run(["sweep", "prefetch", str(plan), "--check", str(record), "--json"])
    assert same.exit_code == 0 and json.loads(same.stdout.splitlines()[-1])["facts"] == []
    found = records.read_json(record)
    found["models"]["tiny-llama"]["files"]["config.json"] = "0" * 64
    records.write_json(record, found)
    other = run(["sweep", "prefetch", str(plan), "--check", str(record)])
    assert other.exit_code == 1 and "config.json differs" in other.output
    records.write_json(record, {"format": 1})
    bad = run(["sweep", "prefetch", str(plan), "--check", str(record)])
    assert bad.exit_code == 2 and "no record of sweep prefetch" in bad.output


def test_the_sha256_of_training_rows_is_the_fingerprint_of_the_run(tmp_path):
    config = sparsity.SparsityConfig(model="tiny-llama", limit=8, steps=2)
    assert prefetch.fetch(PLAN)["data"]["boolq of bundled, first 8, training rows"] == (
        sparsity.training_text(config).sha256
    )


def test_adapters_bring_the_model_they_belong_on(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny-gpt2"}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    plan = {"kind": "evaluation", "base": {"model": str(folder), "task": "boolq", "data": "bundled"}}
    found = prefetch.fetch({**plan, "axes": {"limit": [1, 2]}})
    assert set(found["models"]) == {str(folder), "tiny-gpt2"}
    assert len({name for name in found["data"] if "limit" in name}) == 4, "each limit has lines of its own"
