"""Do models get in only when they are whole, and out so that plain transformers computes the same?"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_fixtures import VOCABULARY, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers import attention, data, evaluate, models

pytest_plugins = ["model_fixtures"]

CLOSED = [(0, 1), (0, 3), (1, 0)]
IDS = torch.tensor([[5, 0, 17, 290, 41, 8, 8, 120]])


def load(folder: object, **options) -> models.LoadedModel:
    return models.load_model(str(folder), device="cpu", **options)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture
def broken(model_folders, tmp_path) -> Callable[[Callable[[Path], object]], str]:
    """A copy of the llama folder after something was done to it."""

    def make(damage: Callable[[Path], object], kind: str = "llama") -> str:
        folder = tmp_path / f"broken-{kind}"
        shutil.copytree(model_folders[kind], folder)
        damage(folder)
        return str(folder)

    return make


def change_json(name: str, **values) -> Callable[[Path], object]:
    """Damage: other values in one of the folder's JSON files."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(content))

    return change


# ---------------------------------------------------------------------------------------------------- names


def test_a_bundled_name_comes_before_a_folder_of_the_same_name(model_folders, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "BUNDLED", tmp_path / "assets")
    shutil.copytree(model_folders["gpt2"], tmp_path / "assets" / "tiny-random")
    (tmp_path / "tiny-random").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.bundled_names() == ["tiny-random"]
    assert models.locate("tiny-random") == ("bundled", str(tmp_path / "assets" / "tiny-random"))
    assert models.load_model("tiny-random", device="cpu").source == "bundled"


def test_a_folder_is_loaded_with_its_own_tokenizer(model_folders):
    loaded = load(model_folders["llama"])
    assert (loaded.source, loaded.name) == ("folder", str(model_folders["llama"]))
    assert loaded.tokenizer("a")["input_ids"][0] == VOCABULARY - 2
    assert not loaded.model.training and attention.is_installed(loaded.model)


def test_a_run_directory_stands_for_the_model_in_it(model_folders, tmp_path):
    shutil.copytree(model_folders["gpt2"], tmp_path / "run" / "model")
    assert models.locate(str(tmp_path / "run")) == ("folder", str(tmp_path / "run" / "model"))
    assert torch.equal(logits(load(tmp_path / "run").model), logits(load(model_folders["gpt2"]).model))


@pytest.mark.parametrize(
    "name, place",
    [
        ("opt-125m", "facebook/opt-125m"),
        ("OPT-125M", "facebook/opt-125m"),
        ("facebook/opt-125m", "facebook/opt-125m"),
        ("somebody/something", "somebody/something"),
    ],
)
def test_a_hub_model_goes_by_its_catalogue_name_or_its_id(name, place):
    assert models.locate(name) == ("hub", place)


@pytest.mark.parametrize(
    "name, message",
    [
        ("opt-125", r"unknown model 'opt-125'. Did you mean 'opt-125m'\? Available: .*or a hub id like owner/name"),
        ("", "model must be named, got ''; give a bundled name, a local folder or a hub id"),
        ("./nothing", "model folder './nothing' does not exist; give a bundled name, an existing folder or a hub id"),
        ("~nobody/nothing", "model folder '~nobody/nothing' does not exist"),
        ("a/b/c", "model folder 'a/b/c' does not exist"),
        ("runs/", "unknown model 'runs/'"),
    ],
)
def test_an_unknown_name_is_refused_with_what_there_is(name, message):
    with pytest.raises(LookupError, match=message) as caught:
        models.load_model(name)
    assert "\n" not in str(caught.value)


def test_a_hub_model_out_of_reach_gives_one_line_with_the_way_out():
    with pytest.raises(
        ValueError, match="cannot load 'nobody/nothing': .* no such folder here.*check the id"
    ) as caught:
        models.load_model("nobody/nothing", device="cpu")
    assert "\n" not in str(caught.value)


def test_the_config_alone_reads_no_weights(broken):
    folder = broken(lambda folder: (folder / "model.safetensors").unlink())
    assert models.load_config(folder).num_attention_heads == 4


# ---------------------------------------------------------------------------------------------------- unusable folders


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "is no model: it has no config.json; name a folder"),
        (truncate, "holds a corrupt safetensors file .*; copy the model again"),
        (write("model.safetensors", ""), "holds a corrupt safetensors file .*header too small"),
        (only_a_pickle, "no file named model.safetensors .*only safetensors are read: save it again"),
        (without_weights, "no file named model.safetensors .*only safetensors are read: save it again"),
        (change_json("config.json", num_hidden_layers=3), r"lacks weights .*: model.layers.2.*\(9 in all\)"),
        (change_json("config.json", hidden_size=64), r"lacks weights .* or has them in another shape: .*\(21 in all\)"),
        (change_json("config.json", model_type="nope"), "has model type `nope` .*check its config.json"),
        (change_json("config.json", num_attention_heads="four"), "'num_attention_heads'.*check its config.json"),
        (change_json("config.json", num_attention_heads=5), "not a multiple of the number of attention heads"),
        (write("config.json", "{"), "is not a valid JSON file"),
        (write("config.json", "[]"), "cannot load .*; check its config.json"),
        (write("config.json", "{}"), "Should have a `model_type` key in its config.json"),
        (without_tokenizer, "instantiate the backend tokenizer.*; check its tokenizer files"),
        (write("tokenizer.json", "{"), "check its tokenizer files"),
        (write("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'), "check its tokenizer files"),
    ],
)
def test_a_folder_that_is_no_whole_model_gives_one_line_that_names_it(broken, damage, message):
    folder = broken(damage)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_in_place_of_a_folder_is_refused(model_folders):
    with pytest.raises(ValueError, match="model must be a folder, got the file .*config.json'; name the folder"):
        load(model_folders["gpt2"] / "config.json")


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_code_in_a_model_folder_is_never_run_and_never_asked_about(broken, model_type, monkeypatch):
    """A person who is asked may say yes; nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def plant(folder: Path) -> None:
        (folder / "planted.py").write_text("raise SystemExit('foreign code was run')")
        auto = {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M", "AutoTokenizer": ["planted.T", None]}
        change_json("config.json", model_type=model_type, auto_map=auto)(folder)
        change_json("tokenizer_config.json", tokenizer_class="PlantedTokenizer", auto_map=auto)(folder)

    with pytest.raises(ValueError, match=r"contains custom code which must be executed"):
        load(broken(plant))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float23"}, "unknown dtype 'float23'. Did you mean 'float32'"),
        ({"quantization": "3bit"}, "unknown quantization '3bit'. Did you mean '8bit'|unknown quantization '3bit'"),
    ],
)
def test_an_unknown_precision_is_refused_before_anything_is_read(options, message):
    with pytest.raises(LookupError, match=message):
        models.load_model("./nothing", **options)


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_precision_that_was_asked_for(model_folders, dtype):
    model = load(model_folders["llama"], dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_auto_is_float32_on_a_cpu_and_stored_is_what_the_file_holds(model_folders, tmp_path):
    make_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    make_tokenizer(bos=False).save_pretrained(tmp_path / "half")
    assert next(load(tmp_path / "half").model.parameters()).dtype == torch.float32
    assert next(load(tmp_path / "half", dtype="stored").model.parameters()).dtype == torch.bfloat16


def test_loaded_in_float32_the_logits_are_those_of_plain_transformers(model_folders):
    for kind in ("gpt2", "llama"):
        plain = AutoModelForCausalLM.from_pretrained(model_folders[kind], attn_implementation="sdpa").eval()
        assert torch.equal(logits(load(model_folders[kind]).model), logits(plain))


@pytest.mark.parametrize("kind, quantization", [("llama", "8bit"), ("llama", "4bit")])
def test_quantised_weights_score_near_the_full_ones_on_a_cpu(model_folders, kind, quantization):
    pytest.importorskip("bitsandbytes")
    row = {"input_ids": IDS[0], "labels": IDS[0]}
    full = evaluate.perplexity(load(model_folders[kind]).model, [row])
    model = load(model_folders[kind], quantization=quantization).model
    found = evaluate.perplexity(model, [row])
    assert model.get_memory_footprint() < load(model_folders[kind]).model.get_memory_footprint()
    assert found.nll != full.nll and found.nll == pytest.approx(full.nll, rel={"8bit": 0.02, "4bit": 0.3}[quantization])


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.fixture(params=["gpt2", "llama"])
def pruned(request, model_folders) -> models.LoadedModel:
    loaded = load(model_folders[request.param])
    attention.close_heads(loaded.model, CLOSED)
    return loaded


def test_a_pruned_model_comes_back_with_its_heads_closed_and_its_logits(pruned, tmp_path):
    before = logits(pruned.model)
    folder = models.save_model(pruned.model, pruned.tokenizer, tmp_path / "a" / "model")
    again = load(folder)
    assert attention.closed_heads(again.model) == CLOSED
    assert torch.equal(logits(again.model), before)
    assert models.tokenizer_fingerprint(again.tokenizer) == models.tokenizer_fingerprint(pruned.tokenizer)


def test_plain_transformers_computes_what_the_pruned_model_does(pruned, tmp_path):
    folder = models.save_model(pruned.model, pruned.tokenizer, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (logits(plain) - logits(pruned.model)).abs().max() <= 1e-5 * logits(plain).abs().max()
    assert AutoTokenizer.from_pretrained(folder)("Tom")["input_ids"] == pruned.tokenizer("Tom")["input_ids"]


def test_saving_leaves_the_model_in_memory_as_it_was(pruned, tmp_path):
    before = models.fingerprint(pruned.model)
    models.save_model(pruned.model, pruned.tokenizer, tmp_path / "model")
    assert models.fingerprint(pruned.model) == before


def test_a_saved_model_saved_again_is_the_same(pruned, tmp_path):
    first = load(models.save_model(pruned.model, pruned.tokenizer, tmp_path / "first"))
    second = load(models.save_model(first.model, first.tokenizer, tmp_path / "second"))
    assert models.fingerprint(first.model) == models.fingerprint(second.model)


def test_an_open_model_is_saved_bit_for_bit_without_a_gates_file(model_folders, tmp_path):
    loaded = load(model_folders["gpt2"])
    folder = models.save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    assert not (folder / "head_gates.json").exists()
    assert models.fingerprint(load(folder).model) == models.fingerprint(loaded.model)


def test_bfloat16_weights_come_back_as_bfloat16(model_folders, tmp_path):
    loaded = load(model_folders["llama"], dtype="bfloat16")
    attention.close_heads(loaded.model, CLOSED)
    again = load(models.save_model(loaded.model, loaded.tokenizer, tmp_path / "model"), dtype="stored")
    assert torch.equal(logits(again.model), logits(loaded.model)) and logits(again.model).dtype == torch.bfloat16


def test_a_folder_with_something_in_it_is_not_written_to(model_folders, tmp_path):
    loaded = load(model_folders["gpt2"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="model folder '.*model' is not empty; choose another one"):
        models.save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["mine.txt"]


def test_an_empty_folder_and_what_a_killed_run_left_beside_are_no_hindrance(model_folders, tmp_path):
    loaded = load(model_folders["gpt2"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "model-00001-of-00002.safetensors").write_text("half a shard")
    models.save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert "model-00001-of-00002.safetensors" not in os.listdir(tmp_path / "model")


def test_a_full_disk_leaves_nothing_and_gives_one_line(pruned, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for object_, name in ((pruned.model, "save_pretrained"), (models.records, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(object_, name, full)
            with pytest.raises(OSError, match="cannot write model folder '.*model': No space left on device; free"):
                models.save_model(pruned.model, pruned.tokenizer, tmp_path / "model")
        assert os.listdir(tmp_path) == []


def test_an_interrupted_save_leaves_nothing(pruned, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruned.tokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        models.save_model(pruned.model, pruned.tokenizer, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_while_the_weights_are_written_leaves_nothing(model_folders, tmp_path):
    """For real: no file of this process may grow beyond 20 kB for a moment."""
    loaded = load(model_folders["gpt2"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write model folder '.*model': .*too large.*; free some space"):
            models.save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "values, message",
    [
        ({"layers": 3}, r"head_gates.json' is for 3 layers of 4 heads, the model has 2 of 4"),
        ({"heads": 8}, r"is for 2 layers of 8 heads, the model has 2 of 4"),
        ({"format": 99}, r"has format 99, expected 1"),
        ({"closed_heads": [[0, 4]]}, r"head \(0, 4\) does not exist"),
        ({"closed_heads": None}, r"needs a list 'closed_heads', got None"),
    ],
)
def test_gates_of_another_model_are_refused(pruned, tmp_path, values, message):
    folder = models.save_model(pruned.model, pruned.tokenizer, tmp_path / "model")
    change_json("head_gates.json", **values)(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_gates_file_that_is_none_is_refused(pruned, tmp_path, text):
    folder = models.save_model(pruned.model, pruned.tokenizer, tmp_path / "model")
    (folder / "head_gates.json").write_text(text)
    with pytest.raises(ValueError, match="head_gates.json' (is not valid JSON|has format None)"):
        load(folder)


# ---------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_that_of_the_weights_not_of_the_object(model_folders):
    first, again = (models.fingerprint(load(model_folders["llama"]).model) for _ in range(2))
    assert first == again
    assert first == models.fingerprint(AutoModelForCausalLM.from_pretrained(model_folders["llama"]))


def test_the_fingerprint_sees_a_single_bit(model_folders):
    model = load(model_folders["llama"]).model
    before = models.fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 4] ^= 1
    assert models.fingerprint(model) != before


def test_the_fingerprint_sees_gates_and_precision(model_folders):
    model = load(model_folders["llama"]).model
    seen = {models.fingerprint(model)}
    attention.close_heads(model, [(0, 0)])
    seen.add(models.fingerprint(model))
    attention.close_heads(model, [(0, 1)])
    seen.add(models.fingerprint(model))
    attention.close_heads(model, [])
    assert models.fingerprint(model) in seen
    seen.add(models.fingerprint(model.to(torch.bfloat16)))
    assert len(seen) == 4


def test_the_fingerprint_sees_two_tensors_that_change_places():
    model = make_model("llama")
    before = models.fingerprint(model)
    first, second = (layer.input_layernorm.weight for layer in model.model.layers)
    with torch.no_grad():
        first.fill_(2.0)
        changed = models.fingerprint(model)
        first.fill_(1.0), second.fill_(2.0)
    assert len({before, changed, models.fingerprint(model)}) == 3


def test_the_tokenizer_fingerprint_sees_bos_but_not_how_it_was_last_called():
    plain, starting = make_tokenizer(bos=False), make_tokenizer(bos=True)
    before = models.tokenizer_fingerprint(plain)
    assert before != models.tokenizer_fingerprint(starting)
    plain("a long text", truncation=True, max_length=2)
    assert models.tokenizer_fingerprint(plain) == before == models.tokenizer_fingerprint(make_tokenizer(bos=False))


# ---------------------------------------------------------------------------------------------------- counts


def test_tied_parameters_count_once():
    model = make_model("gpt2")  # 300x32 embeddings tied to the head, 64x32 positions, 2 layers, final norm
    layer = 12 * 32 * 32 + 13 * 32
    assert models.parameters(model) == 300 * 32 + 64 * 32 + 2 * layer + 2 * 32


def test_positions_come_from_the_config_under_whatever_name(model_folders):
    assert models.max_positions(models.load_config(str(model_folders["gpt2"]))) == 64
    assert models.max_positions(make_model("llama")) == 64


def test_a_long_text_is_tokenised_without_a_warning(model_folders, caplog):
    tokenizer = models.load_tokenizer(str(model_folders["gpt2"]))
    data.token_stream(tokenizer, [data.Document("cat " * 500)])
    assert not caplog.records


@pytest.mark.data
def test_the_real_model_without_a_pad_token_loads_and_writes(data_dir):
    began = time.monotonic()
    loaded = load(data_dir / "models" / "stories260K-hf")
    assert loaded.tokenizer.pad_token_id is None
    text = evaluate.generate(loaded.model, loaded.tokenizer, "Once upon a time", max_new_tokens=20, temperature=0)
    assert text.startswith("Once upon a time, there was a")
    assert models.parameters(loaded.model) == 260_032 and time.monotonic() - began < 60


def test_a_tokenizer_that_ends_every_text_does_so_no_more_once_loaded_or_is_refused(model_folders, tmp_path):
    """Whatever follows a text would follow its end."""
    from tokenizers import processors

    tokenizer = models.load_tokenizer(str(model_folders["gpt2"]))
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((model_folders["gpt2"] / "config.json").read_text())
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][-1] == tokenizer.eos_token_id
    wanted = tokenizer("a", add_special_tokens=False)["input_ids"]
    try:
        found = models.load_tokenizer(str(tmp_path))("a")["input_ids"]
    except ValueError as error:  # where transformers cannot switch it off
        found = str(error)
    assert found == wanted or "ends every text with its end token" in str(found)


def test_the_commit_of_a_hub_model_is_that_of_the_config_in_the_hubs_cache(monkeypatch, tmp_path):
    import huggingface_hub

    kept = tmp_path / "models--a--b" / "snapshots" / "0123abcd" / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(kept))
    assert models.hub_commit("a/b") == "0123abcd"
    assert models.hub_commit("tiny-llama") is None, "a bundled model has files of its own"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: None)
    assert models.hub_commit("a/b") is None
