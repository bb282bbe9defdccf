"""Is perplexity what a naive implementation gives, and generation seeded and free of side effects?"""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from model_fixtures import POSITIONS, VOCABULARY, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from nbhelpers import data, evaluate, models
from nbhelpers.data import Document
from nbhelpers.tracking import Interrupted

pytest_plugins = ["model_fixtures"]


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(bos=False)


def random_rows(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def naive(model, rows) -> tuple[float, int]:
    """(sum of nll, scored tokens), one forward pass a prefix, in float64, without batches, masks or labels to shift."""
    model, total, count = copy.deepcopy(model).double(), 0.0, 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        for at in range(1, len(ids)):
            if labels[at] == -100:
                continue
            with torch.no_grad():
                logits = model(ids[None, :at]).logits[0, -1]
            total += float(torch.logsumexp(logits, 0) - logits[labels[at]])
            count += 1
    return total, count


# ---------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_equals_a_naive_token_by_token_sum_in_float64(model):
    rows = random_rows(16, 16, 16)
    total, count = naive(model, rows)
    found = evaluate.perplexity(model, rows)
    assert found.nll == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_tokens_are_the_scored_ones_so_the_first_of_each_window_does_not_count(model):
    found = evaluate.perplexity(model, random_rows(10, 10, 10, 10))
    assert (found.tokens, found.windows) == (4 * 9, 4)


def test_a_model_without_knowledge_has_a_perplexity_of_its_vocabulary(model):
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.zeros_(parameter)
    assert evaluate.perplexity(model, random_rows(12)).perplexity == pytest.approx(VOCABULARY, rel=1e-5)


def test_rows_of_different_length_score_in_one_batch_as_they_do_alone(model):
    rows = random_rows(5, 20, 2, 13)
    alone = [evaluate.perplexity(model, [row]) for row in rows]
    nll, tokens = evaluate.row_losses(model, rows, batch_size=4)
    assert nll.tolist() == pytest.approx([one.nll * one.tokens for one in alone], abs=1e-4)
    assert tokens.tolist() == [4, 19, 1, 12] and nll.dtype == torch.float64


def test_text_that_holds_id_zero_and_the_pad_id_at_its_end_is_scored_whole(model):
    ids = torch.tensor([7, 0, 0, VOCABULARY - 1, 0, VOCABULARY - 1, VOCABULARY - 1])
    rows = [{"input_ids": ids, "labels": ids}, *random_rows(12)]
    total, count = naive(model, rows)
    found = evaluate.perplexity(model, rows, batch_size=2)
    assert found.tokens == count == 6 + 11
    assert found.nll == pytest.approx(total / count, abs=1e-5)


def test_the_batch_size_does_not_matter(model):
    rows = random_rows(*range(3, 20))
    whole = evaluate.perplexity(model, rows, batch_size=64)
    for size in (1, 3, None):
        assert evaluate.perplexity(model, rows, batch_size=size).nll == pytest.approx(whole.nll, abs=1e-6)


def test_labels_of_minus_100_are_not_scored(model):
    rows = random_rows(12, 9)
    for row in rows:
        row["labels"] = data.mask_prompt(row["input_ids"], 5)
    total, count = naive(model, rows)
    found = evaluate.perplexity(model, rows)
    assert found.tokens == count == 7 + 4
    assert found.nll == pytest.approx(total / count, abs=1e-5)


def test_nothing_to_score_is_an_error(model):
    row = random_rows(6)[0] | {"labels": torch.full((6,), -100)}
    with pytest.raises(ValueError, match="no token is scored: every label is masked"):
        evaluate.perplexity(model, [row])
    with pytest.raises(ValueError, match="no rows to score; give more text"):
        evaluate.perplexity(model, [])


@pytest.mark.parametrize("training", [True, False])
def test_scoring_uses_no_dropout_and_leaves_the_mode_as_it_was(training):
    model, rows = make_model("gpt2"), random_rows(16)
    expected = evaluate.perplexity(model, rows).nll
    model.train(training)
    assert evaluate.perplexity(model, rows).nll == expected
    assert model.training is training and model.transformer.h[0].attn.training is training


def test_the_mode_is_restored_after_an_error_too():
    model = make_model("gpt2").train()
    with pytest.raises(IndexError, match="index out of range"):
        evaluate.perplexity(model, [{"input_ids": torch.tensor([1, 10**6]), "labels": torch.tensor([1, 2])}])
    assert model.training


def test_broken_weights_raise_an_error_that_names_the_window(model):
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3], [4, 5, 6], [1, 9, 2])]
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    with torch.no_grad():
        model.set_output_embeddings(torch.nn.Linear(32, VOCABULARY, bias=False))
    with pytest.raises(FloatingPointError, match="the loss of window 2 is nan; try float32, or check the model's"):
        evaluate.perplexity(model, rows, batch_size=2)


def test_a_loss_too_large_for_a_perplexity_is_an_error(model):
    with torch.no_grad():
        model.set_output_embeddings(torch.nn.Linear(32, VOCABULARY, bias=False))
        model.get_output_embeddings().weight.mul_(1e6)
    with pytest.raises(FloatingPointError, match="nats a token, its perplexity is no finite number"):
        evaluate.perplexity(model, random_rows(10))


def test_progress_is_told_and_stop_is_honoured_between_batches(model):
    seen = []
    evaluate.perplexity(model, random_rows(4, 4, 4), batch_size=2, progress=seen.append)
    assert seen == [{"done": 2, "total": 3}, {"done": 3, "total": 3}]
    answers = iter([False, True])
    with pytest.raises(Interrupted, match="stopped after 2 of 3 windows"):
        evaluate.perplexity(model, random_rows(4, 4, 4), batch_size=2, should_stop=lambda: next(answers))


def test_batches_keep_the_logits_within_their_share_of_memory(model):
    bytes_a_row = 4 * POSITIONS * VOCABULARY
    assert evaluate.batch_rows(model, POSITIONS) == min(64, evaluate.LOGIT_BYTES // bytes_a_row)
    model.config.vocab_size = 10**9
    assert evaluate.batch_rows(model, POSITIONS) == 1


# ---------------------------------------------------------------------------------------------------- the real model


def test_the_loss_of_the_real_model_is_the_one_that_transformers_computes_itself(data_dir):
    loaded = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype="float32")
    rows = data.rows(loaded.tokenizer, data.read_documents(data_dir / "tinystories.jsonl"), 512, 2048)
    plain = AutoModelForCausalLM.from_pretrained(data_dir / "models" / "stories260K-hf", dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [plain(row["input_ids"][None], labels=row["input_ids"][None]).loss.item() for row in rows]
    assert evaluate.perplexity(loaded.model, rows).nll == pytest.approx(sum(losses) / 4, abs=1e-5)


@pytest.mark.slow
def test_the_real_model_has_its_published_loss_on_stories(data_dir):
    """Reference of the data folder: 390 windows of 512, 199,290 scored tokens, nll 1.4832."""
    loaded = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype="float32")
    rows = data.rows(loaded.tokenizer, data.read_documents(data_dir / "tinystories.jsonl"), 512, 200_000)
    found = evaluate.perplexity(loaded.model, rows)
    assert (found.windows, found.tokens) == (390, 199_290)
    assert found.nll == pytest.approx(1.4832, abs=0.0002)
    assert found.perplexity == pytest.approx(4.4072, abs=0.001)


@pytest.mark.slow
def test_the_real_model_has_its_reference_perplexity_on_wikitext(data_dir):
    """Reference of the data folder: the whole raw file behind one BOS, 783 windows of 512, perplexity 127.60."""
    loaded = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype="float32")
    rows = data.rows(loaded.tokenizer, data.read_documents(data_dir / "wikitext2_test_raw.txt"), 512)
    found = evaluate.perplexity(loaded.model, rows)
    assert found.windows == 783
    assert found.perplexity == pytest.approx(127.60, abs=0.01)


# ---------------------------------------------------------------------------------------------------- generation


def test_a_sample_follows_its_seed(model, tokenizer):
    first, again, other = (evaluate.generate(model, tokenizer, "Tom went", seed=seed) for seed in (3, 3, 4))
    assert first == again != other and first.startswith("Tom went")


def test_sampling_leaves_every_global_generator_as_it_was(model, tokenizer):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate.generate(model, tokenizer, "Tom went", seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_what_other_code_drew_before_does_not_matter(model, tokenizer):
    first = evaluate.generate(model, tokenizer, "Tom went", seed=3)
    torch.rand(17)
    assert evaluate.generate(model, tokenizer, "Tom went", seed=3) == first


def test_temperature_zero_takes_the_likeliest_token_each_time(model, tokenizer):
    ids = tokenizer("Tom went", return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(10):
        likeliest = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, likeliest.view(1, 1)], 1)
        if likeliest == tokenizer.eos_token_id:
            break
    text = evaluate.generate(model, tokenizer, "Tom went", max_new_tokens=10, temperature=0)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    greedy = model.generate(ids[:, :length], do_sample=False, max_new_tokens=10, pad_token_id=0)
    assert text == tokenizer.decode(greedy[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "prompt must not be empty; give at least one word"),
        ("word " * POSITIONS, {}, rf"prompt has \d+ tokens, the model has {POSITIONS} positions; shorten the prompt"),
        ("Tom", {"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(model, tokenizer, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.generate(model, tokenizer, prompt, **options)


def test_a_text_never_runs_past_the_positions_of_the_model(model, tokenizer, monkeypatch):
    written, real = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: written.append(real(**options)) or written[-1])
    model.generation_config.eos_token_id = None
    evaluate.generate(model, tokenizer, "Tom went", max_new_tokens=10**6)
    assert written[0].shape == (1, POSITIONS)


def test_generation_needs_no_pad_token_and_no_end_token(model, tokenizer):
    assert tokenizer.pad_token_id is None
    model.generation_config.eos_token_id = None
    assert evaluate.generate(model, tokenizer, "Tom went", max_new_tokens=3)
    model.generation_config.eos_token_id = [VOCABULARY - 1, VOCABULARY - 2]
    assert evaluate.generate(model, tokenizer, "Tom went", max_new_tokens=3)


def test_generation_uses_no_dropout_and_leaves_the_mode_as_it_was(tokenizer):
    model = make_model("gpt2")
    expected = evaluate.generate(model, tokenizer, "Tom went")
    assert evaluate.generate(model.train(), tokenizer, "Tom went") == expected
    assert model.training


def test_a_prompt_of_rows_is_continued_from_the_same_tokens_as_it_was_trained(tokenizer):
    row = data.completion_row(tokenizer, Document(" yes", prompt="Is it?"), window=32)
    assert row["input_ids"][: row["prompt_length"]].tolist() == tokenizer("Is it?")["input_ids"]
