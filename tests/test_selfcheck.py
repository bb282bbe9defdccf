"""Does the self-check say OK of a machine that works, and FAILED with each fault built in?"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import answer, call
from transformers.utils import logging as transformers_logging

from nbhelpers import attention, catalogue, evaluate, facts, machine, memory, models, plots, records, report, selfcheck
from nbhelpers.runs import read_run
from nbhelpers.selfcheck import CHECKS, SelfCheckConfig, run_selfcheck
from nbhelpers.tracking import Interrupted

TINY = SelfCheckConfig(models="tiny-llama")


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A copy of the bundled models that a test may spoil."""
    shutil.copytree(models.BUNDLED.parent, tmp_path / "assets")
    monkeypatch.setattr(models, "BUNDLED", tmp_path / "assets" / "models")
    monkeypatch.setattr(catalogue, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets" / "models"


@pytest.fixture
def bench(tmp_path) -> selfcheck.Bench:
    made = records.read_json(models.BUNDLED.parent / "manifest.json")["models"]
    return selfcheck.Bench(["tiny-llama"], made, tmp_path, 0, "cpu")


def check(name: str, bench: selfcheck.Bench) -> facts.Fact:
    [(says, function)] = [(says, function) for says, function in CHECKS.items() if function.__name__ == name]
    return selfcheck._checked(function, says, bench)


# ------------------------------------------------------------------------------------------------ the run


def test_everything_holds_here_and_is_recorded_as_a_run(tmp_path):
    told = []
    result = run_selfcheck(SelfCheckConfig(models="tiny-llama,tiny-gpt2"), root=tmp_path, progress=told.append)
    assert [fact["saw"] for fact in result["facts"] if not fact["ok"]] == []
    assert result["all_facts_hold"] and result["verdict"].endswith(f"{len(CHECKS)} of {len(CHECKS)} checks hold")
    run = read_run(result["run_dir"])
    assert (run.status, run.kind, run.config["models"]) == ("finished", "self_check", "tiny-llama,tiny-gpt2")
    assert run.result["models"] == ["tiny-gpt2", "tiny-llama"] and run.result["facts"] == result["facts"]
    assert report.headline(run) == result["verdict"] and run.result["text"] == {"source": "bundled", "generated": True}
    assert [now["done"] for now in told] == list(range(len(CHECKS))) and told[0]["total"] == len(CHECKS)
    assert {event["name"] for event in run.events if event["kind"] == "check"} == {f["name"] for f in result["facts"]}
    assert not list(run.folder.glob(".scratch*")), "no model is left in the record"


def test_what_is_claimed_is_the_same_on_every_machine(bench):
    """The claims are compared between executions; times, sizes and devices belong into what was seen."""
    made = bench.made["tiny-llama"]["pruning"]["nll"]
    fact = check("models_predict_as_made", bench)
    assert fact.says == "the bundled models predict held-out text as when they were made (tiny-llama 1.85)"
    assert f"{2.718281828459045**made:.2f}" == "1.85"
    assert check("there_is_room", bench).says == "there is room to work (1.0 GB of disk and of memory)"
    assert check("device_multiplies_right", bench).says in CHECKS


def test_progress_bars_are_off_inside_and_as_before_afterwards(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        selfcheck, "CHECKS", {"x": lambda bench: (seen.append(transformers_logging.is_progress_bar_enabled()), "", "")}
    )
    monkeypatch.setattr(
        selfcheck, "_checked", lambda check, says, bench: check(bench) and facts.Fact("x", True, "", "")
    )
    before = transformers_logging.is_progress_bar_enabled()
    try:
        for wanted in (True, False):
            (transformers_logging.enable_progress_bar if wanted else transformers_logging.disable_progress_bar)()
            run_selfcheck(TINY, root=tmp_path)
            assert transformers_logging.is_progress_bar_enabled() is wanted
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()
    assert seen == [False, False]


def test_stop_ends_it_between_two_checks(tmp_path):
    told = []
    with pytest.raises(Interrupted, match=f"stopped after 1 of {len(CHECKS)} checks"):
        run_selfcheck(TINY, run_dir=tmp_path / "run", progress=told.append, should_stop=lambda: len(told) == 1)
    assert read_run(tmp_path / "run").status == "interrupted"


# ------------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": "tiny-lama"}, "unknown bundled model 'tiny-lama'. Did you mean 'tiny-llama'"),
        ({"models": ""}, "unknown bundled model ''"),
        ({"models": "tiny-llama,gpt2"}, "unknown bundled model 'gpt2'"),
        ({"model": "tiny-llama"}, "unknown field 'model'. Did you mean 'models'"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"name": ""}, "at least 1 character"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SelfCheckConfig(**values)


def test_models_are_named_with_commas_and_each_is_checked_once():
    assert SelfCheckConfig(models="tiny-opt, tiny-gpt2,tiny-opt").names() == ["tiny-gpt2", "tiny-opt"]
    assert SelfCheckConfig().names() == models.bundled_names()


def test_the_seed_decides_what_is_multiplied(bench):
    assert check("device_multiplies_right", bench).saw != check("device_multiplies_right", replace(bench, seed=1)).saw


# ------------------------------------------------------------------------------------------------ saboteurs


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the last bit of the last float32: no number that is measured changes
    path.write_bytes(content)


def test_one_changed_byte_of_the_weights_fails(bundle, bench):
    assert check("files_are_as_made", bench).ok
    flip_a_byte(bundle / "tiny-llama" / "model.safetensors")
    fact = check("files_are_as_made", bench)
    assert not fact.ok and fact.saw == "changed or missing: tiny-llama/model.safetensors"


def test_a_missing_file_fails(bundle, bench):
    (bundle / "tiny-llama" / "tokenizer_config.json").unlink()
    assert "tiny-llama/tokenizer_config.json" in check("files_are_as_made", bench).saw


def test_a_model_that_predicts_otherwise_fails(bench):
    with torch.no_grad():
        bench.model("tiny-llama").model.norm.weight.mul_(1.1)
    assert not check("models_predict_as_made", bench).ok


def test_a_model_that_cannot_be_loaded_is_a_fact_and_no_traceback(bundle, tmp_path):
    path = bundle / "tiny-llama" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    result = run_selfcheck(TINY, root=tmp_path)
    failed = {fact["name"]: fact["saw"] for fact in result["facts"] if not fact["ok"]}
    assert "ValueError: 'tiny-llama' holds a corrupt safetensors file" in failed["models_predict_as_made"]
    assert {"figures_can_be_drawn", "records_survive"} & failed.keys() == set(), "the other checks went on"
    assert not result["all_facts_hold"] and result["verdict"].startswith("something does not work here")


def test_a_gate_that_does_nothing_fails(bench, monkeypatch):
    assert check("closed_heads_add_nothing", bench).ok
    monkeypatch.setattr(attention, "apply_gate", lambda output, gate: output)
    assert not check("closed_heads_add_nothing", bench).ok


def test_an_attention_that_is_not_the_models_own_fails(bench, monkeypatch):
    assert check("open_gates_are_transparent", bench).ok
    honest = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **o: (honest(*a, **o)[0] * 1.001, None))
    assert not check("open_gates_are_transparent", bench).ok


def test_training_that_changes_nothing_fails(bench, monkeypatch):
    assert check("training_lowers_the_loss", bench).ok
    monkeypatch.setattr(selfcheck.training, "fine_tune", lambda *arguments, **options: None)
    assert not check("training_lowers_the_loss", bench).ok


def test_a_model_that_is_saved_without_its_closed_heads_fails(bench, monkeypatch):
    honest = models.save_model

    def forgetful(model, tokenizer, folder):
        honest(model, tokenizer, folder)
        os.unlink(folder / models.GATES_FILE)
        return folder

    monkeypatch.setattr(models, "save_model", forgetful)
    assert not check("saved_model_is_the_same", bench).ok


def test_a_file_that_is_written_in_place_fails(bench, monkeypatch):
    def in_place(path, obj, durable=True):
        text = json.dumps(obj)
        with open(path, "w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            time.sleep(0.02)
            file.write(text[len(text) // 2 :])

    monkeypatch.setattr(records, "write_json", in_place)
    fact = check("records_survive", bench)
    assert not fact.ok and not fact.saw.startswith("0 torn reads")


def test_a_reader_that_counts_no_torn_line_fails(bench, monkeypatch):
    honest = records.read_lines
    monkeypatch.setattr(records, "read_lines", lambda path: (honest(path)[0], 0))
    assert not check("records_survive", bench).ok


def test_a_figure_that_is_no_picture_fails(bench, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda figure: b"")
    assert not check("figures_can_be_drawn", bench).ok


def test_a_device_that_multiplies_a_little_wrong_fails(bench, monkeypatch):
    monkeypatch.setattr(selfcheck, "product", lambda a, b: (a @ b) * (1 + 1e-4))
    fact = check("device_multiplies_right", bench)
    assert not fact.ok and "float32 off by 1.0e-04" in fact.saw


def test_four_bits_that_lose_the_text_fail_and_a_missing_package_is_named(bench, monkeypatch):
    honest, plain = models.load_model, bench.model("tiny-llama")
    bench.few("tiny-llama")

    def spoiled(name, quantization=None, **options):
        loaded = honest(name, **options)
        torch.nn.init.zeros_(loaded.model.model.norm.weight)
        return loaded

    monkeypatch.setattr(models, "load_model", spoiled)
    assert not check("four_bits_work_or_it_is_said_why_not", bench).ok

    def without(name, **options):
        raise ValueError("'tiny-llama' needs a package that is missing: bitsandbytes")

    monkeypatch.setattr(models, "load_model", without)
    fact = check("four_bits_work_or_it_is_said_why_not", bench)
    assert fact.ok and "is missing: bitsandbytes" in fact.saw
    assert evaluate.perplexity(plain, bench.few("tiny-llama")).nll > 0, "the shared model is not given back"


def test_a_full_disk_or_memory_fails(bench, monkeypatch):
    assert check("there_is_room", bench).ok
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9 - 1)
    assert not check("there_is_room", bench).ok


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def two_checks(monkeypatch) -> None:
    """Only the quick checks: of files and of records."""
    wanted = ("files_are_as_made", "records_survive")
    few = {says: function for says, function in CHECKS.items() if function.__name__ in wanted}
    monkeypatch.setattr(selfcheck, "CHECKS", few)


def test_the_command_prints_every_check_and_its_record(two_checks, tmp_path):
    found = answer("self-check", "--models", "tiny-llama", "--out", tmp_path / "run")
    assert found["all_facts_hold"] and len(found["facts"]) == 2
    assert read_run(tmp_path / "run").result["seconds"] == found["seconds"]


def test_the_command_fails_with_a_check(two_checks, bundle, tmp_path):
    flip_a_byte(bundle / "tiny-llama" / "model.safetensors")
    done = call("self-check", "--models", "tiny-llama", "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "FAILED the files of the bundled models are those that were made: changed or missing" in done.stdout
    assert "1 of 2 checks hold" in done.stdout and str(tmp_path / "run") in done.stdout


def test_one_model_of_all_that_changed_is_found_whatever_the_others(bundle, tmp_path):
    flip_a_byte(bundle / "tiny-opt" / "model.safetensors")
    made = records.read_json(bundle.parent / "manifest.json")["models"]
    everything = selfcheck.Bench(SelfCheckConfig().names(), made, tmp_path, 0, "cpu")
    assert check("files_are_as_made", everything).saw == "changed or missing: tiny-opt/model.safetensors"


def test_the_machine_is_described_with_and_without_sums():
    found = machine.describe("lora")
    short, long = machine.environment_text(found), machine.environment_text(found, sums=True)
    assert len(long.splitlines()) == len(short.splitlines()) + len(found["models"])
    assert all(model["name"] in short and model["sum"] in long for model in found["models"])
    assert f"{found['memory']['ram_total'] / 1e9:.1f} GB" in short
    assert re.search(r"^  (fits|no  ) gpt2 +0\.55 GB +[\d.]+ [GM]B  mit$", short, re.MULTILINE)
    assert "{" not in short, "no raw record"
