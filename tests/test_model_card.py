"""The model card says what the run's record says, nothing else, and how the model beside it is asked."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from nbhelpers import model_card, models
from nbhelpers.prompts import Prompts, Wording

KEY = "SLM_tiny-llama_finetuned"
CANARY = "canary-7b1f the patient says it hurts"
DIALOGUE = "Doctor: What is it?\nPatient: I am thirsty all day."
MANIFEST = {
    "run_id": "comparison-20260101-abc123",
    "config_sha256": "cd" * 32,
    "config": {"slm_models": [{"name": "tiny-llama"}, {"name": "tiny-gpt2"}], "llm_models": [{"name": "small-llama"}]},
    "fingerprints": {"data": "ab" * 32},
    "environment": {"host": "host-of-somebody", "libs": {"torch": "2.13.0", "transformers": "5.23.0"}},
}


LABELS = ("E119", "I10", "J189", "J45909", "K219", "N390")
TRAINED = {"method": "lora", "steps": 120, "epochs": 3.0, "rows": 75, "seconds": 1380.0, "tokens_per_second": 2150.0}
TRAINED |= {"trainable_parameters": 24_300_000, "total_parameters": 3_234_000_000, "lora_rank": 16, "lora_alpha": 32.0}
TRAINED |= {"learning_rate": 2e-4, "train_losses": [[1, 2.5], [120, 0.25]], "validation_nlls": [[120, 0.5]]}
TRAINED |= {"best_step": 120}


def entry(model: str, kind: str, status: str, right: int, parameters: int | None = None) -> dict:
    """An entry of results.json that got `right` of 96; written answers only of language models."""
    share, tuned = right / 96, status == "finetuned"
    values = dict.fromkeys(model_card.METRICS, share) | {"top_3_accuracy": (right + 3) / 96, "macro_f1": share / 2}
    writes = kind in ("LLM", "SLM")
    return {
        "model": model,
        "model_type": kind,
        "training_status": status,
        "parameters": parameters,
        "precision": "bfloat16" if writes else None,
        "training_metrics": TRAINED if tuned else None,
        "n_samples": 96,
        **values,
        "exact_match_accuracy": share if writes else None,
        "no_valid_answer": 18 if writes else None,
        "intervals": {name: {"low": value - 0.01, "high": value + 0.02} for name, value in values.items()},
        "performance": {"came": "measured", "seconds_per_dialogue": 0.18} if writes else None,
        "truncated": 0,
        "errors": [],
    }


@pytest.fixture(scope="module")
def result() -> dict:
    models_ = {
        "LLM_small-llama_untrained": entry("small-llama", "LLM", "untrained", 14, 1_000_000),
        "SLM_tiny-llama_zero_shot": entry("tiny-llama", "SLM", "zero_shot", 9, 300_000),
        KEY: entry("tiny-llama", "SLM", "finetuned", 81, 300_000),
        "SLM_tiny-gpt2_finetuned": entry("tiny-gpt2", "SLM", "finetuned", 66, 250_000),
        "BASELINE_tfidf_linear": entry("tfidf_linear", "BASELINE", "fitted", 53),
    }
    data = {"source": "bundled", "generated": True, "kind": "icd10", "labels": 24, "cleaning": {"empty": 2}}
    data |= {"rows": {"train": 75, "validation": 24, "test": 96}}
    data |= {"split": {"mode": "per_label", "seed": 0, "overlap": {"exact": 0, "near": 0}}}
    return {
        "kind": "comparison",
        "verdict": "Yes, specialisation won.",
        "headline": "top_1_accuracy",
        "data": data,
        "protocol": {"shots": 0},
        "models": models_,
        "paired_tests": [],
        "all_facts_hold": True,
        "text": {"generated": True},
    }


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(models.load_tokenizer("tiny-llama"), Wording(), LABELS, 256, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    loaded = models.load_model("tiny-llama", device="cpu")
    return models.save_model(loaded.model, loaded.tokenizer, tmp_path_factory.mktemp("handed") / "model")


def card(result, folder, manifest=MANIFEST, key=KEY, prompt="Say it.\n\n{dialogue}\n\nCode:", **options) -> str:
    return model_card.text(result, manifest, key, folder, prompt=prompt, **{"new_tokens": 16} | options)


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def changed(result: dict, **changes) -> dict:
    return copy.deepcopy(result) | changes


# the front matter -----------------------------------------------------------------------------------------------------


def test_the_hubs_own_reader_finds_the_numbers_of_the_record(result, folder):
    index = ModelCard(card(result, folder)).data.to_dict()["model-index"]
    name, found = model_index_to_eval_results(index)
    entry = result["models"][KEY]
    assert name == KEY
    assert {one.metric_name: one.metric_value for one in found} == {m: entry[m] for m in model_card.METRICS}
    assert {one.dataset_name for one in found} == {"bundled"} and found[0].dataset_split == "test"


def test_a_measure_that_was_not_taken_stands_nowhere_as_a_number(result, folder):
    without = changed(result)
    without["models"][KEY]["exact_match_accuracy"] = without["models"][KEY]["no_valid_answer"] = None
    text = card(without, folder)
    measured = front(text)["model-index"][0]["results"][0]["metrics"]
    assert "exact_match_accuracy" not in {metric["name"] for metric in measured}
    row = next(line for line in text.splitlines() if line.startswith("| **tiny-llama (fine-tuned)**"))
    assert row.split(" | ")[4] == "not measured"
    assert "Written answers without a valid label: not known of 96" in text


@pytest.mark.parametrize(
    ("name", "licence", "base"),
    [
        ("Qwen/Qwen2.5-1.5B", {"license": "apache-2.0"}, "Qwen/Qwen2.5-1.5B"),
        ("Qwen2.5-1.5B", {"license": "apache-2.0"}, "Qwen/Qwen2.5-1.5B"),
        ("facebook/opt-125m", {"license": "other"}, "facebook/opt-125m"),
        ("somebody/his-model", {"license": "unknown"}, "somebody/his-model"),
        ("tiny-llama", {"license": "mit"}, None),
        ("/volume/somebody/his model", {"license": "unknown"}, None),
    ],
)
def test_base_model_and_licence_are_the_catalogues_or_not_known(name, licence, base, result, folder):
    short = models.records.slug(Path(name).name)
    key = f"SLM_{short}_finetuned"
    other = changed(result, models={key: result["models"][KEY]}, paired_tests=[])
    text = card(other, folder, MANIFEST | {"config": {"slm_models": [{"name": name}]}}, key)
    assert licence.items() <= front(text).items()
    assert front(text).get("base_model") == base
    assert "/volume/" not in text and "somebody/his model" not in text
    assert ("Licence of the base model: not known." in text) == (licence["license"] == "unknown")


def test_of_two_models_with_one_short_name_the_card_names_its_own(result, folder):
    key = "LLM_Llama-3.2-3B-Instruct_finetuned"
    own, other = (f"{owner}/Llama-3.2-3B-Instruct" for owner in ("meta-llama", "unsloth"))
    entry = result["models"][KEY] | {"model": own, "model_type": "LLM"}
    manifest = MANIFEST | {"config": {"slm_models": [{"name": other}], "llm_models": [{"name": own}]}}
    text = card(changed(result, models={key: entry}, paired_tests=[]), folder, manifest, key)
    assert (front(text)["base_model"], front(text)["license"]) == (own, "llama3.2")


def test_text_that_yaml_reads_otherwise_comes_back_as_it_was(result, folder):
    odd = 'a "quoted": {b}, # no comment\n- x: !!binary y'
    text = card(changed(result, data=result["data"] | {"source": odd}), folder)
    assert front(text)["model-index"][0]["results"][0]["dataset"]["name"] == odd


def test_a_hub_data_set_is_linked_and_a_file_is_named_without_its_folders(result, folder):
    hub = changed(result, data=result["data"] | {"source": "Ahmad0067/MedSynth", "generated": False}, text={})
    assert front(card(hub, folder))["datasets"] == ["Ahmad0067/MedSynth"]
    file = changed(result, data=result["data"] | {"source": "/volume/somebody/secret/talks.csv"})
    text = card(file, folder)
    assert "datasets" not in front(text) and "`talks.csv`" in text and "/volume" not in text


def test_generated_data_is_stamped_and_other_data_is_not(result, folder):
    assert "Made with generated data" in card(result, folder)
    assert "generated-data" in front(card(result, folder))["tags"]
    real = changed(result, data=result["data"] | {"generated": False}, text={"generated": False})
    assert "enerated data" not in card(real, folder) and "generated-data" not in front(card(real, folder))["tags"]


# the text -------------------------------------------------------------------------------------------------------------


def test_the_table_gives_every_model_with_the_interval_of_the_record(result, folder):
    text = card(result, folder)
    table = [line for line in text.splitlines() if line.startswith("|") and " 96 |" in line]
    assert len(table) == len(result["models"])
    entry = result["models"]["BASELINE_tfidf_linear"]
    ends = entry["intervals"]["top_1_accuracy"]
    said = f"{entry['top_1_accuracy']:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]"
    assert said in next(line for line in table if "TF-IDF" in line)
    assert table[0].startswith("| **tiny-llama (fine-tuned)**")


def test_a_paired_difference_is_told_from_this_models_side(result, folder):
    test = {"a": "LLM_small-llama_untrained", "b": KEY, "measure": "top_1_accuracy", "n": 96, "holm_p": 0.004}
    test |= {"difference": {"mean": -0.25, "low": -0.4, "high": -0.1}}
    text = card(changed(result, paired_tests=[test]), folder)
    assert "- against small-llama (not fine-tuned): +0.250 [+0.100, +0.400], corrected p 0.004" in text


def test_training_is_told_as_recorded_and_what_was_not_recorded_is_not_known(result, folder):
    text = card(result, folder)
    assert "| learning rate (peak) | 0.0002 |" in text and "| LoRA rank | 16 |" in text
    assert "| share of all parameters | 0.75% |" in text  # 24.3 M of 3,234 M
    without = changed(result)
    without["models"][KEY]["training_metrics"] = None
    assert "| optimizer steps | not known |" in card(without, folder, {})
    assert "config sha256 not known; versions: not known" in card(without, folder, {})


def test_the_notice_stands_at_both_ends(result, folder):
    text = card(result, folder)
    assert text.count(model_card.NOTICE) == 2 and "not for diagnosis" in model_card.NOTICE


def test_no_host_no_dialogue_and_no_markup_of_a_user_gets_in(result, folder):
    odd = changed(result, verdict="won <script>alert(1)</script> | by 3\n# much")
    odd["models"][KEY]["errors"] = [{"id": CANARY, "gold": ["E119"], "said": CANARY}]
    odd["models"][KEY]["precision"] = "<b>bold</b> | x"
    odd["data"]["cleaning"]["texts"] = [CANARY]
    text = card(odd, folder)
    assert "canary" not in text and "host-of-somebody" not in text
    assert "<script>" not in text.replace("\\<script\\>", "") and "<b>" not in text.replace("\\<b\\>", "")
    assert "\n# much" not in text and "\\<b\\>bold\\</b\\> \\| x" in text


def test_a_prompt_with_solved_dialogues_in_it_is_not_copied(result, folder):
    shots = changed(result, protocol=result["protocol"] | {"shots": 2})
    text = card(shots, folder, prompt=f"{CANARY} E11.9\n\n{{dialogue}}\n\nCode:")
    assert "canary" not in text and "holds 2 solved dialogues, which are not copied" in text


# the model beside it --------------------------------------------------------------------------------------------------


def test_plain_transformers_asks_the_exact_prompt_by_the_code_of_the_card(result, folder, prompts, monkeypatch):
    path = model_card.write(
        result,
        MANIFEST,
        KEY,
        folder,
        prompt=prompts.text("{dialogue}"),
        new_tokens=6,
        special_tokens=not prompts.chat,
        end=prompts.end,
    )
    assert path == folder / "README.md"
    code = re.search(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)[1]
    code = code.replace(repr("Doctor: ...\nPatient: ..."), repr(DIALOGUE))
    monkeypatch.chdir(folder)
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, names)
    assert type(names["model"]).__module__.startswith("transformers.")
    assert names["inputs"]["input_ids"][0].tolist() == list(prompts.prompt(DIALOGUE).ids)
    assert names["written"].shape[1] <= len(prompts.prompt(DIALOGUE).ids) + 6
    assert "nbhelpers" not in code


@pytest.mark.parametrize(("plain", "printed"), [(True, "E11.9"), (False, "E11.9 \nI10")])
def test_the_code_writes_as_much_as_was_measured_and_ends_a_plain_answer_with_its_line(result, folder, plain, printed):
    class Said:
        """Stands for a model and its tokenizer that write two lines."""

        def __call__(self, *_, **__):
            return {"input_ids": torch.zeros(1, 3, dtype=torch.long)}

        def generate(self, max_new_tokens, **_):
            self.most = max_new_tokens
            return torch.zeros(1, 5, dtype=torch.long)

        def decode(self, *_, **__):
            return " E11.9 \nI10"

    text = card(result, folder, MANIFEST | {"config": {"new_tokens": 4}}, new_tokens=23, special_tokens=plain)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    said, out = Said(), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code[code.index("prompt = ") :], {"model": said, "tokenizer": said})
    assert said.most == 23 and out.getvalue() == f"{printed}\n"


def test_a_prompt_with_backticks_braces_and_quotes_stays_code(result, folder):
    prompt = 'It\'s a "code" {like} ```this```\n{dialogue}\nCode:'
    text = card(result, folder, prompt=prompt)
    code = re.search(r"````python\n(.*?)\n````", text, re.DOTALL)[1]
    assert eval(re.search(r"^prompt = (.*)$", code, re.MULTILINE)[1]) == prompt


def test_adapters_are_said_to_be_adapters(result, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    text = card(result, tmp_path)
    assert front(text)["library_name"] == "peft"
    assert "adapters, which belong on the base model" in text and "models.load_model('.')" in text


# who is refused -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_handed_over_is_refused_by_name(result, folder, tmp_path):
    with pytest.raises(LookupError, match="unknown model of this run 'SLM_tiny-lama_finetuned'. Did you mean"):
        card(result, folder, key="SLM_tiny-lama_finetuned")
    with pytest.raises(ValueError, match=r"'LLM_small-llama_untrained' was not fine-tuned \(untrained\)"):
        card(result, folder, key="LLM_small-llama_untrained")
    with pytest.raises(ValueError, match=r"prompt must hold \{dialogue\} where the dialogue goes, got 5 characters"):
        card(result, folder, prompt="Code:")
    with pytest.raises(ValueError, match="holds no saved model"):
        card(result, tmp_path)
