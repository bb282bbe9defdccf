"""What is secret never reaches a file, and what is not stays readable."""

import logging
import re

import pytest
from run_folders import tracker

from nbhelpers.records import read_json, sha256_json
from nbhelpers.redaction import Redactor
from nbhelpers.tracking import ExperimentConfig


def test_a_canary_token_is_nowhere_in_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_HUB_TOKEN", "canary-one-1234")
    monkeypatch.setenv("SERVICE_API_KEY", "canary-two-1234")
    command = ["nbhelpers", "--token", "canary-three", "--api-key=canary-four", "--url", "x?k=canary-two-1234"]
    command += ["hf_canaryfive", "-p", "hf_token", "canary-six", "--limit-tokens", "1000"]
    config = ExperimentConfig(name="x", note="see canary-one-1234")
    environment = {"found": {"canary": "canary-one-1234"}, "hub": "hf_canarysevenABCDEFGH"}

    def go():
        with tracker(tmp_path, config, command=command, environment=environment) as run:
            run.event("note", text="canary-two-1234")
            logging.getLogger("nbhelpers").warning("using %s", "canary-one-1234")
            raise ValueError("no access with canary-one-1234 or hf_canaryeight123")

    with pytest.raises(ValueError, match="no access"):
        go()
    for path in tmp_path.iterdir():
        found = re.findall(r"canary-\w+|hf_canary\w+", path.read_text())
        assert not found, (path.name, found)
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["command"] == [
        "nbhelpers",
        "--token",
        "***",
        "--api-key=***",
        "--url",
        "x?k=***",
        "***",
        "-p",
        "hf_token",
        "***",
        "--limit-tokens",
        "1000",
    ]
    assert manifest["config_sha256"] == sha256_json(manifest["config"])


def test_settings_that_are_no_secrets_stay_readable():
    redactor = Redactor({"TOKENIZERS_PARALLELISM": "false", "KEY_COUNT": "1", "HOME": "/data"})
    command = ["run", "--control", "false", "--tokenizer", "gpt2", "--max-new-tokens", "16", "level=0.3", "/data/x"]
    assert redactor.command(command) == command
    assert redactor.text("hf_home and tiny-gpt2") == "hf_home and tiny-gpt2"
