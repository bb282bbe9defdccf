"""Do the commands around the comparison do what they say, and refuse bad input in one clear line?"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nbhelpers import cli, comparison_report

TINY = (
    *("--max-train-samples", "8", "--max-eval-samples", "32", "--answers", "ranking", "--latency-requests", "1"),
    *("--break-even-points", "0", "--method", "full", "--epochs", "1", "--window", "256", "--device", "cpu"),
    *("--baselines", "majority"),
)


def call(*arguments: object):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build(words), words)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(what the command printed, run directory) of a small comparison by command."""
    root = tmp_path_factory.mktemp("compared")
    out = root / "run"
    result = call("compare", "run", "--experiment", "full", "--model-slm", "tiny-llama", *TINY, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), out


def test_a_comparison_by_command_leaves_results_and_a_report(done):
    found, out = done
    assert found["kind"] == "comparison" and found["models"]["SLM_tiny-llama_finetuned"]["n_samples"] == 32
    assert {"results.json", "result.json", "report.html", "manifest.json"} <= {path.name for path in out.iterdir()}
    assert found["data"]["generated"] is True
    assert found["licences"]["tiny-llama"] == {"licence": "mit", "gated": False}
    assert set(found["licences"]) == {"small-llama", "tiny-llama"}


def test_for_people_the_verdict_stands_first_and_generated_data_are_stamped(done):
    _, out = done
    again = call("compare", "run", "--model-slm", "tiny-llama", *TINY, "--out", out.parent / "again")
    assert again.exit_code == 0, again.stderr
    said = [f"{name}: licence mit, not gated" for name in ("small-llama", "tiny-llama")]
    assert again.stderr.splitlines()[:2] == said, "licence and gate stand in the first lines"
    lines = again.stdout.splitlines()
    assert "specialisation" in lines[0].lower()
    assert "All of this on dialogues that this project generated itself." in lines
    assert any(line.startswith("SLM_tiny-llama_finetuned") for line in lines)
    assert "not for diagnosis" in again.stdout or "Nothing here is for diagnosis" in again.stdout


def test_options_win_over_the_config_file_and_the_file_over_defaults(tmp_path, monkeypatch):
    from nbhelpers.comparison import Comparison

    asked = []

    def only_asked(config, **_):
        asked.append(config)
        raise ValueError("this far")

    monkeypatch.setattr(Comparison, "run", only_asked)
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 5\nseed: 7\ncache: true\nllm_models: [tiny-opt]\n")
    call("compare", "run", "--config", file, "--seed", "8", "--force-recompute", "--model-slm", "tiny-pythia")
    call("compare", "run", "--model-llm", "a/b", "--llm-4bit", "--model-slm", "tiny-llama")
    config, quantised = asked
    assert [model.quantization for model in (*quantised.llm_models, *quantised.slm_models)] == ["4bit", None]
    assert (config.epochs, config.seed, config.batch_size, config.cache) == (5, 8, 8, False)
    assert [model.name for model in (*config.llm_models, *config.slm_models)] == ["tiny-opt", "tiny-pythia"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epohcs: 5\n", "Did you mean 'epochs'"),
        ("- a\n- b\n", "must be a mapping of fields, got list"),
        ("a: [\n", "is not valid YAML"),
        ("llm_models: 5\n", "llm_models must be a list of names, or of entries with a name, got 5"),
        ("baselines: 5\n", "baselines must be a list of names (majority, nearest, tfidf_linear), got 5"),
        ("5: x\n", "unknown field '5'"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused_in_one_line(tmp_path, text, says):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    result = call("compare", "run", "--config", file, "--out", tmp_path / "run")
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_4_bits_without_models_to_load_so_is_refused(tmp_path):
    result = call("compare", "run", "--slm-4bit", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "--slm-4bit is for models of --model-slm" in result.stderr


def test_the_help_imports_no_model_library_and_says_nothing_on_stderr():
    code = (
        "import sys\nfrom nbhelpers import cli\nsys.argv = ['nbhelpers', 'compare', 'run', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('heavy', sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy []" and done.stderr == ""


def test_every_field_of_the_config_can_be_set_by_command():
    from nbhelpers.comparison_config import ComparisonConfig

    # a wide terminal, so that no option's name is broken into lines
    text = (
        CliRunner().invoke(cli.build(["compare", "run"]), ["compare", "run", "--help"], env={"COLUMNS": "300"}).stdout
    )
    named = {"llm_models": "--model-llm", "slm_models": "--model-slm", "cache": "--force-recompute"}
    assert "(default: full)" in text, "what stands in [] is markup and would not be shown"
    for field in ComparisonConfig.model_fields:
        assert named.get(field, f"--{field.replace('_', '-')}") in text, field


def test_kept_answers_are_cleared_by_command(done, tmp_path):
    (tmp_path / ".predictions" / "coding-x").mkdir(parents=True)
    result = call("compare", "clear-cache", "--root", tmp_path, "--json")
    assert json.loads(result.stdout) == {"deleted": 1} and not list((tmp_path / ".predictions").iterdir())


def test_report_writes_a_page_for_a_comparison_and_for_a_folder_of_runs(done):
    _, out = done
    (out / comparison_report.NAME).unlink()
    single, folder = call("report", out), call("report", out.parent)
    assert single.exit_code == folder.exit_code == 0, folder.stderr
    assert (out / comparison_report.NAME).is_file() and (out.parent / "report.html").is_file()
    empty = call("report", out / "models")
    assert empty.exit_code == 2 and "holds no runs" in empty.stderr


def test_interviews_are_answered_by_the_tuned_model_as_it_was_taught(done, tmp_path):
    found, out = done
    talk = {
        "name": "one",
        "expected_label": found["data"]["label_list"][0],
        "messages": [{"role": "patient", "message": "I am thirsty, canary."}, {"role": "doctor", "message": "Since?"}],
    }
    folder = tmp_path / "talks"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(talk))
    tuned = out / "models" / "SLM_tiny-llama_finetuned"
    result = call("interview", folder, "--model", tuned, "--device", "cpu", "--out", tmp_path / "said.json", "--json")
    assert result.exit_code == 0, result.stderr
    (line,) = json.loads(result.stdout)["models"][str(tuned)]
    assert line["said"] in found["data"]["label_list"] and len(line["ranked"]) == 3
    assert "canary" not in (tmp_path / "said.json").read_text()
    shown = call("interview", folder, "--model", tuned, "--device", "cpu")
    assert "of 1 right" in shown.stdout and "not for diagnosis" in shown.stdout


def test_a_model_that_was_not_tuned_cannot_be_interviewed(tmp_path):
    result = call("interview", tmp_path, "--model", "tiny-llama")
    assert result.exit_code == 2 and "has no prompt.json" in result.stderr


def test_an_older_config_is_migrated_into_one_that_runs(tmp_path):
    from nbhelpers.comparison_config import ComparisonConfig

    old = tmp_path / "old.json"
    old.write_text(json.dumps({"baseline_llms": ["small-llama"], "slm_name": "tiny-llama", "max_eval_samples": 32}))
    result = call("compare", "migrate", old, "--json")
    assert result.exit_code == 0, result.stderr
    config = ComparisonConfig(**json.loads((tmp_path / "old.json.migrated.json").read_text()))
    assert [model.name for model in (*config.llm_models, *config.slm_models)] == ["small-llama", "tiny-llama"]
    assert config.max_eval_samples == 32
    again = call("compare", "migrate", old)
    assert again.exit_code == 2 and "is there already" in again.stderr
