"""The hub models offered by name: their counted sizes, and what is suggested for a job."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nbhelpers import catalogue, estimates, memory

# Total parameters as published: safetensors metadata on the hub, model cards and papers; never from our own counting.
PUBLISHED = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B": 7_248_023_552,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Mixtral-8x7B": 46_702_792_704,
    "Phi-3-mini": 3_821_079_552,
    "TinyLlama": 1_100_048_384,
}
# Bytes of model.safetensors as the hub shows them, to 1 MB (both families carry causal-mask buffers in their files).
PUBLISHED_FILES = {
    "distilgpt2": 353e6,
    "gpt2": 548e6,
    "gpt2-medium": 1520e6,
    "gpt2-large": 3247e6,
    "gpt2-xl": 6432e6,
    "pythia-70m": 166e6,
    "pythia-160m": 375e6,
    "pythia-410m": 911e6,
    "Qwen2.5-0.5B": 988e6,
}


def test_the_catalogue_offers_exactly_the_models_of_the_design():
    assert catalogue.names() == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_stored_parameter_count_is_the_published_one(name):
    assert catalogue.entry(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_stored_shape_is_what_the_config_gives_on_the_meta_device(name):
    entry = catalogue.entry(name)
    assert estimates.shape_of(entry.config) == entry.shape


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_download_size_agrees_with_the_published_file_to_a_megabyte(name):
    assert catalogue.entry(name).download_bytes == pytest.approx(PUBLISHED_FILES[name], abs=1e6)


def test_mistral_v0_1_differs_from_v0_3_by_768_rows_of_vocabulary_in_and_out():
    config = {**catalogue.entry("Mistral-7B").config, "vocab_size": 32_000}
    assert config == catalogue.entry("mistralai/Mistral-7B-v0.1").config
    assert estimates.parameter_count(config) == 7_241_732_096
    assert 7_248_023_552 - 7_241_732_096 == 2 * 768 * 4096


def test_a_model_is_found_by_name_or_hub_id_in_any_case():
    assert catalogue.hub_id("opt-125m") == catalogue.hub_id("Facebook/OPT-125M") == "facebook/opt-125m"
    assert catalogue.entry("meta-llama/Llama-2-7b-hf").download_bytes == 13_476_835_328  # total_size of its index
    assert catalogue.hub_id("LLAMA-3.1-8b") == "meta-llama/Llama-3.1-8B"


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(LookupError, match=r"unknown hub model 'pythia-70b'\. Did you mean 'pythia-70m'\?"):
        catalogue.entry("pythia-70b")


def test_a_name_that_the_catalogue_does_not_have_is_not_known():
    assert catalogue.known("owner/model") is None
    assert catalogue.known("opt-125m") is catalogue.entry("facebook/opt-125m")


def test_names_are_unique_also_without_case_and_every_entry_says_licence_and_gate():
    entries = [catalogue.entry(name) for name in catalogue.names()]
    keys = [key.lower() for e in entries for key in {e.name, e.hub_id}]
    assert len(keys) == len(set(keys))
    assert all(e.licence and e.gated in (True, False, None) for e in entries)
    assert {e.name for e in entries if e.gated} == {name for name in PUBLISHED if name.startswith("Llama-")}


def test_suggestions_fit_or_not_by_their_own_sum_and_stand_in_order():
    free = 17 * 10**9
    found = catalogue.suggest("inference_16bit", free_bytes=free)
    hub = [s for s in found if s.source != "bundled"]
    assert {s.name for s in hub} == set(PUBLISHED)
    assert all(s.fits == (s.required_bytes <= free) for s in hub)
    too_large = {"Llama-3.1-8B", "Llama-3.1-8B-Instruct", "Mixtral-8x7B", "Qwen2.5-7B-Instruct"}
    assert {s.name for s in hub if not s.fits} == too_large  # 16.1 and 15.2 GB of weights + 10 % and activations
    flags = [s.fits for s in found]
    assert flags == sorted(flags, reverse=True)
    sizes = [s.required_bytes for s in found if s.fits]
    assert sizes == sorted(sizes, reverse=True)
    sizes = [s.required_bytes for s in found if not s.fits]
    assert sizes == sorted(sizes)


def test_a_suggestion_shows_its_sum_download_licence_and_gate():
    llama = next(s for s in catalogue.suggest("full_finetuning", free_bytes=0) if s.name == "Llama-3.2-1B")
    assert "1,235.8 M parameters x 4 bytes = 4.9 GB weights" in llama.sum
    assert llama.sum.endswith(estimates.megabytes(llama.required_bytes))
    assert (llama.download_bytes, llama.licence, llama.gated) == (2_471_628_800, "llama3.2", True)


def test_four_bits_help_llama_but_not_the_experts_of_mixtral():
    sixteen = {s.name: s.required_bytes for s in catalogue.suggest("inference_16bit", free_bytes=0)}
    four = {s.name: s.required_bytes for s in catalogue.suggest("inference_4bit", free_bytes=0)}
    assert four["Llama-3.1-8B"] < 0.4 * sixteen["Llama-3.1-8B"]
    assert four["Mixtral-8x7B"] > 0.97 * sixteen["Mixtral-8x7B"]


def test_what_fits_is_asked_of_the_machine_when_no_size_is_given(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    fitting = {s.name for s in catalogue.suggest("inference_16bit") if s.fits and s.source != "bundled"}
    assert "gpt2" in fitting
    assert "gpt2-xl" not in fitting


def test_bundled_models_are_counted_from_their_file_and_always_fit(monkeypatch, tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "catalogue.json").write_text('{"models": []}', encoding="utf-8")
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7)}
    save_file(tensors, tmp_path / "models" / "tiny" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(catalogue, "ASSETS", tmp_path)
    catalogue._entries.cache_clear()
    try:
        (tiny,) = catalogue.suggest("full_finetuning", free_bytes=0)
    finally:
        catalogue._entries.cache_clear()
    assert (tiny.name, tiny.source, tiny.parameters) == ("tiny", "bundled", 22)
    assert (tiny.fits, tiny.download_bytes, tiny.gated) == (True, 0, False)


def test_bad_questions_are_refused_in_one_line():
    with pytest.raises(LookupError, match="unknown job 'inference_32bit'"):
        catalogue.suggest("inference_32bit", free_bytes=1)
    with pytest.raises(ValueError, match="free_bytes must be at least 0, got -1"):
        catalogue.suggest("lora", free_bytes=-1)


def test_suggesting_for_a_given_size_imports_no_torch():
    code = (
        "import sys; from nbhelpers import catalogue; catalogue.suggest('lora', 10**9); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_stored_file_is_strict_json_without_duplicate_models():
    def refuse(word):
        raise AssertionError(word)

    text = (catalogue.ASSETS / "catalogue.json").read_text(encoding="utf-8")
    rows = json.loads(text, parse_constant=refuse)["models"]
    assert len(rows) == len({row["hub_id"] for row in rows}) == 30


# sides of a comparison ------------------------------------------------------------------------------------------------


def test_each_side_of_a_comparison_offers_what_the_issue_names_the_defaults_first():
    assert [model.hub_id for model in catalogue.offered("llm")[:2]] == [
        "meta-llama/Llama-3.1-8B-Instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
    ]
    assert [model.hub_id for model in catalogue.offered("slm")] == [
        "meta-llama/Llama-3.2-3B-Instruct",
        "Qwen/Qwen2.5-3B-Instruct",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "microsoft/Phi-3-mini-4k-instruct",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ]
    for role in catalogue.ROLES:
        for model in catalogue.offered(role):
            assert model.licence and model.download_bytes == 2 * PUBLISHED[model.name]


def test_the_open_set_has_no_gate_no_uncertain_gate_and_no_licence_with_conditions():
    assert [model.name for model in catalogue.open_set("llm")] == ["Qwen2.5-7B-Instruct"]
    assert [model.name for model in catalogue.open_set("slm")] == ["Qwen2.5-1.5B-Instruct", "Phi-3-mini", "TinyLlama"]
    assert catalogue.entry("Mistral-7B-Instruct-v0.3").gated is None
    assert catalogue.entry("Qwen2.5-3B-Instruct").licence == "other (Qwen Research License: non-commercial)"


def test_an_unknown_side_is_refused():
    with pytest.raises(LookupError, match="unknown role 'llms'. Did you mean 'llm'?"):
        catalogue.open_set("llms")


@pytest.fixture
def nobody_logged_in(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    return monkeypatch


def test_without_a_token_its_state_is_absent(nobody_logged_in):
    assert catalogue.token_state() == "absent"


def test_a_token_of_the_environment_or_of_colab_is_present_and_never_shown(nobody_logged_in, caplog, capsys):
    with nobody_logged_in.context() as inside:
        inside.setenv("HF_TOKEN", "hf_canary12345678")
        assert catalogue.token_state() == "present"
    nobody_logged_in.setattr(catalogue.colab, "secret", lambda name: "hf_canary12345678")
    assert catalogue.token_state() == "present"
    said = capsys.readouterr()
    assert "canary" not in caplog.text + said.out + said.err
