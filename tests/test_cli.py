"""Does each command do what it says, exit as it should, and refuse bad input in one clear line?"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from model_fixtures import make_model, make_tokenizer
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner

from nbhelpers import attention, cli, commands, compact, data, evaluate, experiments, headless, models
from nbhelpers.experiments import PruningConfig
from nbhelpers.runs import read_run
from nbhelpers.tracking import Diverged, Interrupted

pytest_plugins = ["model_fixtures"]

PRUNE = ("--window", "32", "--scoring-windows", "2", "--evaluation-windows", "4", "--batch-size", "2")
PRUNE += ("--sample-tokens", "4", "--device", "cpu")


def call(*arguments: object):
    """The command in this process: exit_code, stdout, stderr."""
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build(words), words)


def answer(*arguments: object) -> dict:
    """What a command that must succeed prints with --json: a single line on stdout."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture
def main(monkeypatch, capsys) -> Callable:
    """The command as the shell calls it, what cannot be parsed included."""

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["nbhelpers", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return SimpleNamespace(exit_code=left.value.code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture(scope="session")
def pruned(model_folders, text_file, tmp_path_factory) -> dict:
    """One run by command: scored, closed, fine-tuned for two steps, no control."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ("--model", model_folders["llama"], "--text", text_file, "--strategy", "magnitude", "--level", "0.4375")
    return answer("prune-heads", *arguments, *PRUNE, "--steps", "2", "--no-control", "--out", out)


# ---------------------------------------------------------------------------------------------------- help


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom nbhelpers import cli\nsys.argv = ['nbhelpers', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as left:\n    code = left.code\n"
        "heavy = {'torch', 'transformers', 'nbhelpers.commands', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "print('exit', code, 'heavy', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "exit 0 heavy []"
    for name, (text, _) in cli.COMMANDS.items():
        assert name.split()[0] in done.stdout and (" " in name or text in done.stdout)


def test_the_module_runs_as_a_program_and_hands_on_its_exit_code():
    done = subprocess.run([sys.executable, "-m", "nbhelpers", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such command 'nothing'; see nbhelpers --help\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_and_takes_json(name):
    result = call(*name.split(), "--help")
    assert result.exit_code == 0 and "--json" in result.output and cli.COMMANDS[name][0] in result.output


def test_no_command_at_all_shows_the_help(main):
    assert "prune-heads" in main().out
    assert "refresh" in main("notebooks").out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("prune-haeds",), "no such command 'prune-haeds'"),
        (("notebooks", "rnu"), "no such command 'rnu'"),
        (("prune-heads", "--stpes", "3"), "no such option: --stpes"),
        (("prune-heads", "--level", "much"), "invalid value for '--level': "),
        (("perplexity", "--text", "a.txt"), "missing option '--model'"),
        (
            ("generate", "--model", "m", "--prompt", "p", "--max-new-tokens", "0"),
            "invalid value for '--max-new-tokens'",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_and_with_json_an_object(main, arguments, message):
    plain, as_json = main(*arguments), main(*arguments, "--json")
    assert plain.exit_code == as_json.exit_code == 2
    assert plain.out == "" and plain.err.startswith(f"error: {message}") and plain.err.count("\n") == 1
    assert "; see nbhelpers" in plain.err
    assert json.loads(as_json.out)["error"].startswith(message) and as_json.err == ""


# ---------------------------------------------------------------------------------------------------- options


def test_every_field_of_the_config_is_an_option_with_its_default_and_a_help_line():
    command = get_command(cli.build(["prune-heads"])).commands["prune-heads"]
    options = {option.name: option for option in command.params}
    assert set(options) == {*PruningConfig.model_fields, "out", "json"}
    for name, field in PruningConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in options[name].opts
        assert options[name].default == field.default
        assert options[name].help.startswith(field.description) and len(field.description) > 5


def test_text_from_the_shell_is_read_in_the_type_of_the_field():
    class Config(BaseModel):
        share: float = Field(0.5, description="a share")
        count: int | None = Field(None, description="a count")
        rate: float | None = Field(None, description="a rate")
        name: str | None = Field(None, description="a name")
        precision: Literal["float32", "int8"] = Field("float32", description="a precision")
        flag: bool = Field(True, description="a flag")

    options = {option.name: option.annotation for option in commands.options_of(Config, without=("name",))}
    kinds = {name: annotation.__origin__ for name, annotation in options.items()}
    expected = {"share": float, "count": int | None, "rate": float | None, "precision": str, "flag": bool}
    assert kinds == expected
    assert options["precision"].__metadata__[0].help == "a precision: float32, int8"


def test_every_option_of_prune_heads_reaches_the_config(monkeypatch):
    seen = {}

    def run(config, *, run_dir, progress):
        seen.update(config.model_dump(), run_dir=run_dir)
        return {"all_facts_hold": True}

    monkeypatch.setattr(experiments.PruningExperiment, "run", run)
    values = {
        "name": "n", "model": "m", "text": "t", "strategy": "entropy", "level": 0.25, "iterative": True,
        "heads_per_round": 3, "kv_groups": True, "min_heads_per_layer": 2, "remove": True, "scoring_windows": 5,
        "steps": 7, "method": "lora", "learning_rate": 0.125, "batch_size": 3, "control": False, "window": 9,
        "evaluation_windows": 4, "dtype": "bfloat16", "device": "cpu", "sample_prompt": "p", "sample_tokens": 2,
        "seed": 8,
    }  # fmt: skip
    assert set(values) == set(PruningConfig.model_fields)
    assert all(values[name] != field.default for name, field in PruningConfig.model_fields.items())
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    assert answer("prune-heads", *words, "--out", "o") == {"all_facts_hold": True}
    assert seen == {**values, "run_dir": Path("o")}


# ---------------------------------------------------------------------------------------------------- exit codes


def carry_out(work: Callable[[], dict], capsys, as_json: bool = False):
    with pytest.raises(commands.typer.Exit) as left:
        commands.carry_out(work, lambda result: f"shown {result['x']}", as_json)
    return SimpleNamespace(exit_code=left.value.exit_code, **capsys.readouterr()._asdict())


def raising(error: BaseException) -> Callable[[], dict]:
    def work() -> dict:
        raise error

    return work


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("level must be in [0, 1],\n got 1.5"), 2, "level must be in [0, 1], got 1.5"),
        (LookupError("unknown model 'x'"), 2, "unknown model 'x'"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2,
         "cannot use 'a.txt': no such file or directory; check the path, its permissions and the free space"),
        (OSError(errno.ENOSPC, "No space left on device"), 2,
         "cannot use: no space left on device; check the path, its permissions and the free space"),
        (Diverged("the loss stayed nan"), 1, "the loss stayed nan"),
        (FloatingPointError("the loss of window 3 is nan"), 1, "the loss of window 3 is nan"),
        (Interrupted("stopped in step 3"), 130, "stopped in step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_every_end_has_its_exit_code_and_one_line(capsys, error, code, line):
    plain, as_json = (carry_out(raising(error), capsys, as_json) for as_json in (False, True))
    assert (plain.exit_code, plain.out, plain.err) == (code, "", f"error: {line}\n")
    assert (as_json.exit_code, as_json.err) == (code, "")
    assert json.loads(as_json.out) == {"error": line}


@pytest.mark.parametrize("error", [KeyError("weight"), IndexError("3"), RuntimeError("shapes"), TypeError("str")])
def test_a_fault_of_the_program_exits_1_with_its_traceback_on_stderr(capsys, error):
    found = carry_out(raising(error), capsys, as_json=True)
    assert found.exit_code == 1 and "Traceback" in found.err and type(error).__name__ in found.err
    assert found.out.count("\n") == 1 and "error" in json.loads(found.out)


def test_done_exits_0(capsys):
    assert carry_out(lambda: {"x": 1}, capsys) == SimpleNamespace(exit_code=0, out="shown 1\n", err="")
    assert carry_out(lambda: {"x": 1}, capsys, as_json=True).out == '{"x":1}\n'


def test_a_violated_fact_exits_1_names_the_fact_and_still_prints_the_result(capsys):
    facts = [{"name": "good", "ok": True}, {"name": "loss_is_on_the_completion_alone", "ok": False}]
    error = commands.Violation({"x": 1, "facts": facts})
    plain, as_json = (carry_out(raising(error), capsys, as_json) for as_json in (False, True))
    assert plain.exit_code == as_json.exit_code == 1
    assert plain.out == "shown 1\n" and json.loads(as_json.out) == {"x": 1, "facts": facts}
    assert plain.err == as_json.err == "error: a checked fact does not hold: loss_is_on_the_completion_alone\n"


def test_what_libraries_print_never_reaches_stdout(capsys):
    def noisy() -> dict:
        print("loading")
        sys.stdout.write("no newline at the end")
        return {"x": float("nan")}

    found = carry_out(noisy, capsys, as_json=True)
    assert found.out == '{"not_finite":{"x":"nan"},"x":null}\n' and "loading" in found.err


# ---------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_prints_what_the_library_computes(model_folders, text_file):
    found = answer("perplexity", "--model", model_folders["llama"], "--text", text_file, "--window", "16")
    loaded = models.load_model(str(model_folders["llama"]), device="cpu")
    rows = data.rows(loaded.tokenizer, data.read_documents(text_file), 16)
    expected = evaluate.perplexity(loaded.model, rows)
    assert {name: found[name] for name in ("nll", "perplexity", "tokens", "windows")} == vars(expected)
    assert found["tokens"] == 15 * found["windows"] and found["generated"] is False
    assert (found["window"], found["dtype"]) == (16, "float32")


def test_limit_tokens_cuts_before_the_windows_are_made(model_folders, text_file):
    arguments = ("perplexity", "--model", model_folders["llama"], "--text", text_file, "--window", "16")
    found = answer(*arguments, "--limit-tokens", "79")
    assert (found["windows"], found["tokens"]) == (4, 60)


def test_a_window_is_the_positions_of_a_model_that_has_fewer_than_512(model_folders, text_file):
    assert answer("perplexity", "--model", model_folders["gpt2"], "--text", text_file)["window"] == 64


def test_perplexity_for_people_is_a_sentence_and_generated_text_is_stamped(model_folders, text_file):
    plain = call("perplexity", "--model", model_folders["gpt2"], "--text", text_file, "--limit-tokens", "128").stdout
    assert plain.startswith("perplexity ") and "126 scored tokens in 2 windows of 64" in plain
    assert "generated" not in plain
    stamped = call("perplexity", "--model", model_folders["gpt2"], "--text", "bundled", "--limit-tokens", "128").stdout
    assert "Measured on text that this project generated itself." in stamped


def test_quantised_and_half_precision_models_are_scored(model_folders, text_file):
    pytest.importorskip("bitsandbytes")
    arguments = ("perplexity", "--model", model_folders["llama"], "--text", text_file, "--limit-tokens", "640")
    full, half = answer(*arguments), answer(*arguments, "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16" and half["nll"] == pytest.approx(full["nll"], rel=0.01)
    assert answer(*arguments, "--quantization", "8bit")["nll"] == pytest.approx(full["nll"], rel=0.02)


def test_the_command_gives_the_reference_count_on_the_real_model(data_dir):
    model, text = data_dir / "models" / "stories260K-hf", data_dir / "tinystories.jsonl"
    found = answer("perplexity", "--model", model, "--text", text, "--limit-tokens", "5000", "--dtype", "float32")
    assert (found["window"], found["windows"], found["tokens"]) == (512, 9, 9 * 511)
    assert 1.3 < found["nll"] < 1.7


# ---------------------------------------------------------------------------------------------------- prune-heads


def test_a_pruning_run_prints_every_documented_key(pruned):
    documented = {"baseline", "pruned", "fine_tuned", "control", "pruned_heads", "total_heads", "run_dir", "model_dir"}
    assert documented <= set(pruned)
    assert ("recovery_percent" in pruned) != ("improvement_percent" in pruned)
    assert all(pruned[stage]["perplexity"] > 1 for stage in ("baseline", "pruned", "fine_tuned"))
    assert pruned["control"] is None and pruned["total_heads"] == 8


def test_the_closed_heads_are_sorted_and_as_many_as_half_even_rounding_says(pruned):
    assert len(pruned["pruned_heads"]) == 4  # 0.4375 x 8 = 3.5, to the even 4
    assert pruned["pruned_heads"] == sorted(pruned["pruned_heads"])


def test_out_is_the_run_directory_and_the_model_lies_in_it(pruned):
    assert Path(pruned["model_dir"]) == Path(pruned["run_dir"]) / "model"
    run = read_run(pruned["run_dir"])
    assert run.status == "finished" and run.config["steps"] == 2 and run.config["control"] is False
    saved = models.load_model(pruned["model_dir"], device="cpu")
    assert [list(head) for head in attention.closed_heads(saved.model)] == pruned["pruned_heads"]


def test_what_was_saved_scores_the_same_by_command_and_generates(pruned, tmp_path):
    generated = answer("generate", "--model", pruned["run_dir"], "--prompt", "Tom went", "--temperature", "0",
                       "--max-new-tokens", "20")  # fmt: skip
    assert generated["text"].startswith("Tom went") and generated["closed_heads"] == 4
    plain = AutoModelForCausalLM.from_pretrained(pruned["model_dir"])
    tokenizer = models.load_tokenizer(pruned["model_dir"])
    ids = tokenizer("Tom went", return_tensors="pt")["input_ids"]
    written = plain.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert generated["text"] == tokenizer.decode(written[0], skip_special_tokens=True)


def test_without_fine_tuning_a_run_for_people_has_a_line_a_stage_and_the_verdict(model_folders, text_file, tmp_path):
    result = call("prune-heads", "--model", model_folders["gpt2"], "--text", text_file, "--strategy", "random",
                  "--level", "0.3125", "--steps", "0", "--out", tmp_path / "run", *PRUNE)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "baseline " in result.stdout and "pruned " in result.stdout and "fine_tuned" not in result.stdout
    assert "not fine-tuned" in result.stdout and "OK " in result.stdout and "FAILED" not in result.stdout
    record = read_run(tmp_path / "run").result
    assert record["fine_tuned"] is None and record["control"] is None
    assert len(record["pruned_heads"]) == 2  # 0.3125 x 8 = 2.5, to the even 2
    assert "baseline" not in result.stderr.splitlines()[-1] and "measuring" in result.stderr


def test_a_run_that_removes_heads_shows_before_and_after(model_folders, text_file, tmp_path):
    arguments = ["--model", model_folders["gpt2"], "--text", text_file, "--strategy", "magnitude", "--steps", "0"]
    result = call("prune-heads", *arguments, "--level", "0.25", "--remove", "--out", tmp_path / "run", *PRUNE)
    assert result.exit_code == 0 and "FAILED" not in result.stdout, result.stderr
    gone = 2 * (3 * 8 * 33 + 8 * 32)  # of each head: query, key and value rows with their biases, output columns
    whole = read_run(tmp_path / "run").result["parameters"]
    assert f"Removed 2 of 8 heads: {whole:,} -> {whole - gone:,} parameters, " in result.stdout
    assert re.search(r"[\d.]+ -> [\d.]+ MB of weights, [\d,]+ -> [\d,]+ tokens/s\.\n", result.stdout)
    assert "The saved model loads with nbhelpers alone: its architecture's config cannot say" in result.stdout
    generated = answer("generate", "--model", tmp_path / "run", "--prompt", "Tom went")
    assert generated["text"].startswith("Tom went") and generated["closed_heads"] == 0


def test_removing_single_heads_that_share_keys_is_refused_with_the_way_out(model_folders, text_file, tmp_path):
    words = ["--model", model_folders["llama"], "--text", text_file, *PRUNE, "--remove", "--out", tmp_path / "run"]
    check_refused("prune-heads", words, r"remove needs whole KV groups, and here 2 heads share .*: add --kv-groups")
    assert not (tmp_path / "run").exists()


def test_a_compact_model_whose_config_cannot_say_it_is_not_pruned_further(model_folders, text_file, tmp_path):
    model = models.load_model(str(model_folders["gpt2"]), device="cpu")
    attention.close_heads(model.model, [(0, 1)])
    models.save_model(compact.remove_heads(model.model), model.tokenizer, tmp_path / "compact")
    words = ["--model", tmp_path / "compact", "--text", text_file, *PRUNE, "--out", tmp_path / "run"]
    check_refused("prune-heads", words, r"compact' is a compact model .*cannot be pruned further; prune the model it")
    assert not (tmp_path / "run").exists()
    assert answer("perplexity", "--model", tmp_path / "compact", "--text", text_file, "--limit-tokens", "500")


def test_a_violated_fact_fails_the_command(monkeypatch, tmp_path):
    failed = {"all_facts_hold": False, "facts": [{"name": "same", "ok": False}], "x": 1}
    monkeypatch.setattr(experiments.PruningExperiment, "run", lambda config, **options: failed)
    result = call("prune-heads", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout) == failed
    assert result.stderr == "error: a checked fact does not hold: same\n"


# ---------------------------------------------------------------------------------------------------- bad input


def truncated(folder: Path, models_: dict[str, Path]) -> Path:
    shutil.copytree(models_["llama"], folder / "corrupt")
    path = folder / "corrupt" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    return folder / "corrupt"


def incomplete(folder: Path, models_: dict[str, Path]) -> Path:
    shutil.copytree(models_["llama"], folder / "incomplete")
    config = json.loads((folder / "incomplete" / "config.json").read_text())
    (folder / "incomplete" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return folder / "incomplete"


def short(folder: Path, _) -> Path:
    (folder / "short.txt").write_text("A short text.")
    return folder / "short.txt"


def latin(folder: Path, _) -> Path:
    (folder / "latin.txt").write_bytes("Ein kurzer Text über Köpfe".encode("latin-1"))
    return folder / "latin.txt"


def empty(folder: Path, _) -> Path:
    (folder / "empty.txt").write_text("\n")
    return folder / "empty.txt"


def no_field(folder: Path, _) -> Path:
    (folder / "field.jsonl").write_text('{"text": "a"}\n{"story": "b"}\n')
    return folder / "field.jsonl"


def filled(folder: Path, _) -> Path:
    (folder / "filled").mkdir()
    (folder / "filled" / "mine.txt").write_text("x")
    return folder / "filled"


def under_a_file(folder: Path, _) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "run"


def a_folder(folder: Path, _) -> Path:
    return folder


@pytest.mark.parametrize("command", ["perplexity", "prune-heads"])
@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--model", "tiny-gtp9", r"unknown model 'tiny-gtp9'. .*Available: .*or a hub id like owner/name\)"),
        ("--model", "./nothing", r"model folder './nothing' does not exist; give"),
        ("--model", "nobody/nothing", r"cannot load 'nobody/nothing': .*check the id and the connection"),
        ("--model", a_folder, r"is no model: it has no config.json; name a folder"),
        ("--model", truncated, r"corrupt' holds a corrupt safetensors file .*copy the model again"),
        ("--model", incomplete, r"incomplete' lacks weights .*model.layers.2"),
        ("--text", "nothing.txt", r"text file 'nothing.txt' does not exist"),
        ("--text", "", r"text must name a source, got ''"),
        ("--text", short, r"text has \d+ tokens, less than one window of 32; .*smaller --window"),
        ("--text", latin, r"latin.txt' is not UTF-8 at byte 16; convert it"),
        ("--text", empty, r"empty.txt' holds no text"),
        ("--text", no_field, r"field.jsonl' line 2 needs a string field 'text', it has: story"),
        ("--window", "65", r"window must be at most the model's 64 positions, got 65; use a smaller --window"),
        ("--window", "1", r"window must be (at least 2 tokens|greater than or equal to 2), got 1"),
        ("--dtype", "float23", r"unknown dtype 'float23'|dtype must be 'auto', 'float32', .* got 'float23'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(command, option, value, message, model_folders, text_file, tmp_path):
    options = {"--model": model_folders["llama"], "--text": text_file, "--window": "32"}
    options[option] = value(tmp_path, model_folders) if callable(value) else value
    words = [word for pair in options.items() for word in pair]
    if command == "prune-heads":
        words += ["--out", tmp_path / "run", "--steps", "0", "--strategy", "random", "--device", "cpu"]
    check_refused(command, words, message)
    assert not (tmp_path / "run" / "model").exists()


def check_refused(command: str, words: list, message: str) -> None:
    """Exit code 2 and the message; progress may come before it, a traceback never. The second call prints JSON."""
    plain = call(command, *words)
    assert plain.exit_code == 2, plain.output
    lines = plain.stderr.splitlines()
    assert lines[-1].startswith("error: ") and re.search(message, lines[-1]), lines
    assert [line for line in lines[:-1] if line not in ("reading text", "loading")] == [] and plain.stdout == ""
    if "--out" in words:  # a run that got as far as its directory is recorded there as failed
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    as_json = call(command, *words, "--json")
    assert as_json.exit_code == 2 and as_json.stdout.count("\n") == 1
    found = json.loads(as_json.stdout)
    assert set(found) == {"error"} and re.search(message, found["error"])


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--strategy", "entrpy", r"unknown strategy 'entrpy'. Did you mean 'entropy'\? Available: random, magnitude"),
        ("--level", "1.5", r"level must be less than or equal to 1, got 1.5"),
        ("--level", "-0.1", r"level must be greater than or equal to 0, got -0.1"),
        ("--level", "nan", r"level must be .*, got nan"),
        ("--steps", "-1", r"steps must be greater than or equal to 0, got -1"),
        ("--method", "lroa", r"method must be 'full' or 'lora', got 'lroa'"),
        ("--device", "gpu", r"device must be cuda, cuda:N, mps or cpu, got 'gpu'"),
        ("--device", "mps" if torch.cuda.is_available() else "cuda", r"device '(mps|cuda)' is not here; use '"),
    ],
)
def test_a_wrong_value_of_a_pruning_run_is_refused_in_one_line(
    option, value, message, model_folders, text_file, tmp_path
):
    words = ["--model", model_folders["llama"], "--text", text_file, "--out", tmp_path / "run", *PRUNE, option, value]
    check_refused("prune-heads", words, message)


@pytest.mark.parametrize(
    "place, message",
    [
        (filled, r"output folder '.*filled' is not empty: choose another folder"),
        (under_a_file, r"cannot write to output folder '.*run' \(Not a directory\): choose another folder"),
    ],
)
def test_an_output_folder_that_cannot_be_used_is_refused_before_any_work(
    place, message, model_folders, text_file, tmp_path
):
    out = place(tmp_path, None)
    result = call("prune-heads", "--model", model_folders["llama"], "--text", text_file, "--out", out, *PRUNE)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
    assert not out.exists() or os.listdir(out) == ["mine.txt"]


def test_a_full_disk_while_the_model_is_saved_leaves_a_failed_run_without_a_model(
    model_folders, text_file, tmp_path, monkeypatch
):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    words = ("--model", model_folders["llama"], "--text", text_file, "--strategy", "random", "--steps", "0", *PRUNE)
    result = call("prune-heads", *words, "--out", tmp_path / "run")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert "error: cannot write model folder" in result.stderr.splitlines()[-1]
    assert "No space left on device; free some space" in result.stderr
    run = read_run(tmp_path / "run")
    assert run.status == "failed" and not list((tmp_path / "run").glob("model*"))


# ---------------------------------------------------------------------------------------------------- the others


def test_generate_prints_the_text_and_the_same_for_the_same_seed(model_folders):
    arguments = ("generate", "--model", model_folders["gpt2"], "--prompt", "Tom went", "--max-new-tokens", "8")
    first, again, other = (answer(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first == again and first["text"] != other["text"]
    assert set(first) == {"text", "model", "closed_heads", "max_new_tokens", "temperature", "seed"}
    assert call(*arguments, "--seed", "1").stdout == first["text"] + "\n"


@pytest.mark.parametrize(
    "prompt, message", [("", "prompt must not be empty"), ("word " * 64, r"the model has 64 positions; shorten the")]
)
def test_a_prompt_that_cannot_be_continued_is_refused(model_folders, prompt, message):
    check_refused("generate", ["--model", model_folders["gpt2"], "--prompt", prompt], message)


def test_a_model_without_head_gates_generates_too(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    make_tokenizer(bos=False).save_pretrained(tmp_path)
    assert answer("generate", "--model", tmp_path, "--prompt", "Tom", "--max-new-tokens", "2")["closed_heads"] == 0


def test_env_says_what_is_here_and_what_fits():
    found = answer("env")
    assert set(found) == {"environment", "memory", "job", "models"} and found["job"] == "lora"
    assert {"name", "sum", "fits", "download_bytes", "licence", "gated"} <= set(found["models"][0])
    text = call("env", "--job", "full_finetuning").stdout
    assert "models for full_finetuning" in text and all(model["name"] in text for model in found["models"])


def test_env_refuses_an_unknown_job():
    check_refused("env", ["--job", "flul"], r"unknown job 'flul'.*full_finetuning")


def test_notebooks_hand_names_and_parameters_on_and_fail_with_their_notebooks(monkeypatch, tmp_path):
    seen = []

    def run(names, parameters, out, progress):
        seen.append((names, parameters, out))
        return {"all_facts_hold": len(seen) == 1, "facts": [{"name": "f", "ok": False}], "summary": "found"}

    monkeypatch.setattr(headless, "run_notebooks", run)
    arguments = ("notebooks", "run", "01_pruning", "-p", "level", "0.5", "-p", "steps", "3", "--out", tmp_path)
    assert answer(*arguments)["summary"] == "found"
    assert seen == [(["01_pruning"], {"level": "0.5", "steps": "3"}, tmp_path)]
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "found\n")


def test_an_unknown_notebook_and_an_unknown_parameter_are_refused(monkeypatch, tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    cell = new_code_cell("level: float = 0.3", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[cell], metadata=kernel), tmp_path / "notebooks" / "01_pruning.ipynb")
    for words, message in (
        (["01_prunning"], "unknown notebook '01_prunning'. Did you mean '01_pruning'"),
        (["-p", "levle", "0.3"], "unknown parameter 'levle'. Did you mean 'level'"),
        (["-p", "level"], "parameter 'level' needs a value: -p NAME VALUE"),
    ):
        result = call("notebooks", "run", *words)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_interrupting_a_run_exits_130(monkeypatch, model_folders, text_file, tmp_path):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "perplexity", interrupt)
    words = ("--model", model_folders["llama"], "--text", text_file, "--steps", "0", *PRUNE, "--out", tmp_path / "run")
    result = call("prune-heads", *words, "--json")
    assert result.exit_code == 130 and json.loads(result.stdout) == {"error": "interrupted"}
    assert read_run(tmp_path / "run").status == "interrupted"


def test_the_models_of_these_tests_are_no_trivial_ones():
    model = make_model("llama")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert model(ids).logits.softmax(-1).max() > 0.05
