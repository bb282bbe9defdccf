"""Are log-likelihoods those of each choice in a row of its own, however many share a context?"""

from __future__ import annotations

import pytest
import small_models
import torch

from nbhelpers import attention, scoring
from nbhelpers.scoring import Question
from nbhelpers.tracking import Interrupted

pytest_plugins = ["model_fixtures"]
CHOICES = ((5, 6, 7), (5, 6), (5, 9, 8, 1), (30,), (31,), (5, 6, 7))  # one begins another, two are equal, two are short


def questions(seed: int = 0) -> list[Question]:
    """Contexts of 1 to 20 tokens, with all CHOICES, some of them, or one."""
    drawn = torch.Generator().manual_seed(seed)
    contexts = [tuple(torch.randint(1, 64, (n,), generator=drawn).tolist()) for n in (12, 1, 20, 7)]
    return [
        Question(c, choices) for c, choices in zip(contexts, (CHOICES, CHOICES[2:5], CHOICES, CHOICES[:1]), strict=True)
    ]


@torch.inference_mode()
def alone(model, asked: Question, limit: int) -> list[float]:
    """The textbook way: context and choice in a row of their own, log_softmax, a sum over the choice's tokens."""
    found = []
    for choice in asked.choices:
        ids = torch.tensor([(asked.context + choice)[-(limit + 1) :]])
        logs = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)[0]
        found.append(sum(logs[-len(choice) + at, token].item() for at, token in enumerate(choice)))
    return found


def built(name: str, **options) -> torch.nn.Module:
    model = small_models.build(name, **options)
    if options.get("attention", "sdpa") == "sdpa":
        attention.install(model)
    return model


def scored(model, asked, **options) -> list[list[float]]:
    return [values for _, values in sorted(scoring.loglikelihoods(model, asked, **options))]


@pytest.mark.parametrize("name", small_models.NAMES)
def test_choices_that_share_a_context_score_as_in_rows_of_their_own(name):
    model, asked = built(name), questions()
    for found, question in zip(scored(model, asked), asked, strict=True):
        assert found == pytest.approx(alone(model, question, 64), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_eager_attention_scores_the_same(name):
    plain, asked = small_models.build(name, attention="eager"), questions()
    gated = built(name)
    for one, other in zip(scored(plain, asked), scored(gated, asked), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_an_eager_model_takes_masks_of_added_numbers():
    model = small_models.build("llama", attention="eager")
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    found = attention.visible(model, mask, torch.arange(3)[None], torch.arange(3)[None])["attention_mask"]
    assert found.shape == (1, 1, 3, 3) and found[0, 0, 2, 0] == 0 and found[0, 0, 0, 2] < -1e30


def test_layers_that_see_different_windows_get_a_mask_each():
    model = built("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert attention.windows(model) == {"full_attention": None, "sliding_attention": 4}
    asked = questions()
    for found, question in zip(scored(model, asked), asked, strict=True):
        assert found == pytest.approx(alone(model, question, 64), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_long_contexts_are_cut_on_the_left_for_each_choice_as_it_needs(name):
    model = built(name)
    asked = [Question(tuple(range(1, 63)), CHOICES), Question(tuple(range(1, 60)) * 2, CHOICES)]
    assert len(scoring.trees(asked[0], 0, 64)) > 1
    for found, question in zip(scored(model, asked), asked, strict=True):
        assert found == pytest.approx(alone(model, question, 64), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral_window"])
def test_many_branches_in_parts_score_as_at_once(name, monkeypatch):
    model = built(name)
    drawn = torch.Generator().manual_seed(1)
    labels = tuple(tuple(torch.randint(1, 9, (n,), generator=drawn).tolist()) for n in (1, 2, 3, 4) * 12)
    asked = [Question(tuple(range(3, 20)), labels)]
    at_once = scored(model, asked)
    monkeypatch.setattr(scoring, "BRANCH_TOKENS", 7)
    assert scored(model, asked)[0] == pytest.approx(at_once[0], abs=1e-4)
    assert at_once[0] == pytest.approx(alone(model, asked[0], 64), abs=1e-4)


def test_the_context_is_read_once_for_all_of_its_branches(monkeypatch):
    monkeypatch.setattr(scoring, "BRANCH_TOKENS", 8)
    model, seen = built("llama"), []
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True)
    labels = tuple((first, second, 3) for first in range(10, 20) for second in (1, 2))
    scored(model, [Question(tuple(range(1, 41)), labels)])
    assert seen[0] == 40 and sum(seen) == 40 + 10 * 3  # each first token and its two second ones; the last is not read


def test_one_token_choices_need_their_context_alone():
    tree = scoring.trees(Question((1, 2, 3), ((7,), (8,))), 0, 64)
    assert [len(one) for one in tree] == [3] and tree[0].wanted == [(2, 7, 0), (2, 8, 1)]


def test_a_tree_holds_each_shared_beginning_once_and_knows_where_branches_end():
    (tree,) = scoring.trees(Question((1, 2), ((5, 6, 7), (5, 9, 7), (5, 6))), 0, 64)
    assert tree.tokens == [1, 2, 5, 6, 9] and tree.positions == [0, 1, 2, 3, 3]
    assert tree.end == [5, 5, 5, 4, 5]
    assert sorted(tree.wanted) == [
        (1, 5, 0),
        (1, 5, 1),
        (1, 5, 2),
        (2, 6, 0),
        (2, 6, 2),
        (2, 9, 1),
        (3, 7, 0),
        (4, 7, 1),
    ]


def test_small_batches_and_the_lack_of_memory_change_nothing():
    model, asked = built("llama"), questions()
    whole = scored(model, asked)
    assert [v for row in scored(model, asked, batch_tokens=1) for v in row] == pytest.approx(
        [v for row in whole for v in row], abs=1e-5
    )
    forward = model.forward

    def limited(*args, input_ids=None, **kwargs):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    model.forward = limited
    assert [v for row in scored(model, asked) for v in row] == pytest.approx(
        [v for row in whole for v in row], abs=1e-5
    )


def test_a_model_whose_attention_is_not_known_scores_row_by_row():
    plain, gated, asked = small_models.build("gpt2"), built("gpt2"), questions()
    seen = []
    plain.register_forward_pre_hook(lambda _m, _a, kw: seen.append(set(kw)), with_kwargs=True)
    for one, other in zip(scored(plain, asked), scored(gated, asked), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert all("attention_mask" not in names for names in seen)


def test_stop_is_heard_between_two_passes():
    asked, calls = questions(), []
    with pytest.raises(Interrupted):
        list(
            scoring.loglikelihoods(
                built("llama"), asked, batch_tokens=1, should_stop=lambda: len(calls) > 1 or calls.append(1)
            )
        )


def test_choices_without_tokens_and_choices_longer_than_the_model_are_refused():
    with pytest.raises(ValueError, match="choice 1 has 70 tokens, more than the 64"):
        scoring.trees(Question((1,), ((2,), tuple(range(70)))), 0, 64)


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tokenizer(request, model_folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folders[request.param])


def test_spaces_at_the_end_of_the_context_go_to_the_choices(tokenizer):
    assert scoring.question(tokenizer, "The dog  ", ["ran"]) == scoring.question(tokenizer, "The dog", ["  ran"])


def test_choices_are_what_context_and_choice_have_beyond_the_context(tokenizer):
    found = scoring.question(tokenizer, "The dog", [" ran", " sat down"])
    assert list(found.context) == tokenizer("The dog")["input_ids"]
    for choice, text in zip(found.choices, (" ran", " sat down"), strict=True):
        assert list(found.context + choice) == tokenizer("The dog" + text)["input_ids"]


def test_an_empty_context_is_the_first_token_of_a_text(tokenizer):
    found = scoring.question(tokenizer, "", ["The dog"])
    assert found.context == (tokenizer.bos_token_id,)
    assert list(found.choices[0]) == tokenizer("The dog", add_special_tokens=False)["input_ids"]


def test_a_choice_without_tokens_is_named(tokenizer):
    with pytest.raises(ValueError, match="choice '' has no tokens of its own"):
        scoring.question(tokenizer, "The dog", [" ran", ""])


def test_a_choice_as_long_as_the_model_reads_is_scored(monkeypatch):
    monkeypatch.setattr(scoring, "longest_text", lambda model: 5000)
    (tree,) = scoring.trees(Question((1,), (tuple(range(2, 4000)), (2, 5))), 0, 5000)
    assert len(tree) == 3998 and len(tree.wanted) == 3998 + 2 and tree.end[0] == 3998
    assert tree.positions == list(range(3998)) and tree.end[2:] == [3998] * 3996
