"""Are the bundled models what the manifest says, and are they worth pruning?"""

import math
import warnings

import pytest
import torch

from nbhelpers import generated, pretrain, pretrain_measure, records

NAMES = list(pretrain.RECIPES)
MANIFEST = records.read_json(pretrain.ASSETS / "manifest.json")["models"]


@pytest.fixture(scope="module")
def bundled():
    """(model, tokenizer) of a bundled model by plain transformers, each loaded once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = pretrain.load(pretrain.ASSETS / "models" / name)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def held_out():
    return generated.documents_with_nats(pretrain.HELD_OUT_DOCUMENTS, generated.HELD_OUT_SEED)


def test_the_manifest_and_the_folder_hold_the_same_models():
    folders = {path.name for path in (pretrain.ASSETS / "models").iterdir() if path.is_dir()}
    assert set(MANIFEST) == folders == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_the_ones_the_manifest_names(name):
    folder = pretrain.ASSETS / "models" / name
    assert {path.name: records.sha256_file(path) for path in folder.iterdir()} == MANIFEST[name]["files"]
    limit = 6_000_000 if name == "small-llama" else 2_000_000
    assert (folder / "model.safetensors").stat().st_size <= limit


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_says_how_the_model_is_made_today(name):
    """A recipe changed without training again is noticed; a field that came later has its default there."""
    recorded = MANIFEST[name]["recipe"]  # JSON has lists where the recipe has tuples
    recorded = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    assert pretrain.Recipe(**recorded) == pretrain.RECIPES[name]


def test_the_training_text_is_still_what_the_generator_writes():
    """A generator changed without training again is noticed, on the text of which the held-out losses speak."""
    texts = generated.documents(pretrain.HELD_OUT_DOCUMENTS, generated.HELD_OUT_SEED)
    assert {MANIFEST[name]["held_out"]["text_sha256"] for name in NAMES} == {pretrain.text_sha256(texts)}


@pytest.mark.slow
def test_the_fingerprint_of_the_whole_training_text_is_right():
    for count in {MANIFEST[name]["training"]["documents"] for name in NAMES}:
        expected = pretrain.text_sha256(generated.documents(count, generated.MODEL_SEED))
        of_this_size = [
            MANIFEST[name]["training"] for name in NAMES if MANIFEST[name]["training"]["documents"] == count
        ]
        assert {training["text_sha256"] for training in of_this_size} == {expected}


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_measured_again_is_that_of_the_manifest(name, bundled, held_out):
    """The whole measurement written out once more: windows without overlap, the first token of each not scored."""
    (model, tokenizer), entry = bundled(name), MANIFEST[name]["held_out"]
    stream = [token for document in held_out for token in tokenizer(document.text)["input_ids"]]
    count, total = len(stream) // entry["window"], 0.0
    with torch.no_grad():
        for at in range(count):
            ids = torch.tensor(stream[at * entry["window"] : (at + 1) * entry["window"]])
            logits = model(ids[None]).logits[0, :-1]
            total += (logits.logsumexp(-1) - logits.gather(1, ids[1:, None])[:, 0]).sum().item()
    tokens = count * (entry["window"] - 1)
    assert (count, tokens, len(held_out)) == (entry["windows"], entry["tokens"], entry["documents"])
    assert math.exp(total / tokens) == pytest.approx(entry["perplexity"], rel=1e-3)
    assert math.exp(entry["nll"]) == pytest.approx(entry["perplexity"])


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_says_that_the_model_is_worth_pruning(name):
    entry, pruning = MANIFEST[name]["against_entropy"], MANIFEST[name]["pruning"]
    assert 0 < entry["gap"] == pytest.approx(entry["nll"] - entry["entropy"])
    assert len(pruning["half_closed_ratios"]) == 5
    assert pruning["half_closed_mean_ratio"] == pytest.approx(sum(pruning["half_closed_ratios"]) / 5)
    assert pruning["half_closed_mean_ratio"] >= 2
    assert len(pruning["head_costs"]) == pruning["heads"]
    assert pruning["costly_heads"] == sum(cost > 0.02 for cost in pruning["head_costs"]) >= pruning["heads"] / 10


def test_tiny_llama_measured_again_is_worth_pruning(bundled, held_out):
    model, tokenizer = bundled("tiny-llama")
    stream = pretrain_measure.token_stream(tokenizer, [document.text for document in held_out[:60]])
    again = pretrain_measure.worth_pruning(model, pretrain_measure.windows(stream, 512)[:6])
    assert again["half_closed_mean_ratio"] >= 2
    assert again["costly_heads"] >= again["heads"] / 10


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_head_is_one_whose_columns_of_the_output_projection_are_zero(name, bundled):
    """Zeroed weights are another way to the same function; each head of layer 1 by itself, then none."""
    model, tokenizer = bundled(name)
    ids = torch.tensor([tokenizer(generated.documents(1, seed=31)[0])["input_ids"]])
    heads = model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    weight = model.get_submodule(pretrain_measure.OUTPUT_PROJECTION[model.config.model_type].format(1)).weight
    rows = weight if model.config.model_type == "gpt2" else weight.T  # Conv1D is (in, out)
    with torch.no_grad():
        open_logits = model(ids).logits
        for head in range(heads):
            kept = rows[head * size : (head + 1) * size].clone()
            rows[head * size : (head + 1) * size] = 0
            expected = model(ids).logits
            rows[head * size : (head + 1) * size] = kept
            with pretrain_measure.closed(model, [(1, head)]):
                assert torch.allclose(model(ids).logits, expected, atol=1e-5)
            assert not torch.allclose(expected, open_logits, atol=1e-5)
        assert torch.equal(model(ids).logits, open_logits)


@pytest.mark.parametrize("name", NAMES)
def test_generating_works_without_warnings_and_ends_with_the_document(name, bundled, caplog):
    model, tokenizer = bundled(name)
    prompt = tokenizer("Problem: Mia has 3 plums.", return_tensors="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = model.generate(**prompt, max_new_tokens=150, do_sample=False)
    assert not caplog.records
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("Problem: Mia has 3 plums.")
    assert ids.shape[1] < prompt["input_ids"].shape[1] + 150, "no end of document"
    assert "\nAnswer: " in text


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_puts_bos_first_gives_text_back_and_knows_its_limits(name, bundled):
    model, tokenizer = bundled(name)
    for text in [*generated.documents(20, seed=32), "Ünïcode 123 \n\t and  two spaces"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.model_max_length == model.config.max_position_embeddings == pretrain.RECIPES[name].context
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) == model.config.vocab_size <= 1024


def test_llamas_share_keys_and_values_between_heads(bundled):
    for name in ("tiny-llama", "small-llama"):
        config = bundled(name)[0].config
        assert config.num_attention_heads == 2 * config.num_key_value_heads


def tiny_recipe(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "intermediate_size": 16, "max_position_embeddings": 512}
    small = {"steps": 20, "batch": 4, "window": 128, "documents": 150, "copying_steps": 4}
    return pretrain.Recipe("llama", sizes, ("<s>", "</s>", "<pad>"), **(small | changes))


def test_batches_read_the_stream_once_and_end_with_long_windows():
    recipe = tiny_recipe(steps=4, long_share=0.5)
    rows = list(pretrain.batches(torch.arange(3000), recipe))
    assert [tuple(row.shape) for row in rows] == [(4, 128), (4, 128), (1, 512), (1, 512)]
    assert torch.equal(torch.cat([row.flatten() for row in rows]), torch.arange(2048))
    with pytest.raises(ValueError, match="training needs 2048 tokens, the text has 2047; raise documents"):
        next(pretrain.batches(torch.arange(2047), recipe))


def test_learning_rate_rises_then_falls_to_a_twentieth():
    recipe = tiny_recipe(steps=1000, learning_rate=1.0)
    rates = [pretrain.learning_rate_at(step, recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[500] == pytest.approx(0.525)  # 0.05 + 0.95 / 2
    assert rates[-1] == pytest.approx(0.05, abs=1e-4)


def test_repetitions_leave_the_text_alone_and_score_only_what_can_be_copied():
    text = torch.zeros(4, 128, dtype=torch.long)
    vocabulary = torch.arange(100, 1000)
    for repeats, period in ((4, 32), (2, 64)):
        rows, labels = pretrain.with_repetitions(text, vocabulary, repeats, torch.Generator().manual_seed(0))
        assert torch.equal(rows[:2], text[:2])
        assert torch.equal(labels[:2], text[:2])
        assert torch.equal(rows[2:, period:], rows[2:, :-period])
        assert rows[2:].min() >= 100
        assert (labels[2:, :period] == -100).all()
        assert torch.equal(labels[2:, period:], rows[2:, period:])


def test_making_a_model_is_repeatable_and_writes_its_manifest(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrain.RECIPES, "tiny-llama", tiny_recipe())
    monkeypatch.setattr(pretrain, "HELD_OUT_DOCUMENTS", 12)
    seen = []
    first = pretrain.make("tiny-llama", tmp_path / "a", seen.append)
    second = pretrain.make("tiny-llama", tmp_path / "b")
    assert first["files"] == second["files"]
    assert seen[0]["step"] == 1
    assert seen[-1]["step"] == 20
    assert seen[-1]["train_loss"] < seen[0]["train_loss"]
    assert records.read_json(tmp_path / "a" / "manifest.json")["models"]["tiny-llama"]["files"] == first["files"]
    assert first["training"]["tokens"] == 20 * 4 * 128


def test_an_unknown_bundled_model_is_refused():
    with pytest.raises(LookupError, match="unknown bundled model 'tiny-lama'. Did you mean 'tiny-llama'"):
        pretrain.make("tiny-lama")


def test_document_loss_of_a_model_that_knows_nothing_is_the_log_of_its_vocabulary(bundled, held_out):
    _, tokenizer = bundled("tiny-llama")

    class Uniform(torch.nn.Module):
        def forward(self, ids):
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 1024)})

    measured = pretrain_measure.document_loss(Uniform(), tokenizer, held_out[:3])
    tokens = sum(len(tokenizer(document.text)["input_ids"]) for document in held_out[:3])
    assert measured["nll"] == pytest.approx(math.log(1024), rel=1e-6)
    assert measured["tokens"] == tokens  # each document loses its first BOS and gains the one after it
    assert measured["entropy"] == pytest.approx(sum(document.nats for document in held_out[:3]) / tokens)
