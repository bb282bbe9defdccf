"""Is what is written that of transformers' own greedy search, row by row, cut where it should be?"""

from __future__ import annotations

import pytest
import torch
from model_fixtures import POSITIONS, make_model, make_tokenizer

from nbhelpers import attention, generation
from nbhelpers.tracking import Interrupted

pytest_plugins = ["model_fixtures"]
PROMPTS = ["The dog ran", "One morning Leo", "Q", "Rosa has the bell and the cup and the red coat", "The dog"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=True)


def built(kind: str, *, gates: bool = True) -> torch.nn.Module:
    model = make_model(kind)
    model.generation_config.eos_token_id = None
    if gates:
        attention.install(model)
    return model


def by_transformers(model, tokenizer, prompt: str, count: int) -> str:
    """One row, no padding, model.generate."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"][-(POSITIONS - count) :]])
    out = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def written(model, tokenizer, prompts, **options) -> list[str]:
    return [text for _, text in sorted(generation.continuations(model, tokenizer, prompts, **options))]


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_row_is_what_transformers_writes_for_it_alone(kind, gates, tokenizer):
    model = built(kind, gates=gates)
    tokenizer.eos_token, eos = None, tokenizer.eos_token
    try:
        found = written(model, tokenizer, PROMPTS, max_new_tokens=24)
    finally:
        tokenizer.eos_token = eos
    assert found == [by_transformers(model, tokenizer, prompt, 24) for prompt in PROMPTS]


def test_a_text_ends_before_the_first_of_its_stop_strings(tokenizer):
    model = built("llama")
    whole = written(model, tokenizer, PROMPTS, max_new_tokens=30)
    stop = whole[0][8:11]  # something that the first text holds
    sizes = []
    model.register_forward_pre_hook(lambda _m, _a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    found = written(model, tokenizer, PROMPTS, max_new_tokens=30, stops=[stop])
    assert found == [text.split(stop)[0] for text in whole] and len(found[0]) <= 8 and sizes[0] == 5


def test_rows_that_have_ended_leave_the_batch(tokenizer):
    model, sizes = built("llama"), []
    whole = written(model, tokenizer, PROMPTS, max_new_tokens=30)
    stops = [text[at : at + 4] for at, text in enumerate(whole[:3], 2)]
    model.register_forward_pre_hook(lambda _m, _a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    found = written(model, tokenizer, PROMPTS, max_new_tokens=30, stops=stops)
    expected = list(whole)
    for stop in stops:
        expected = [text.split(stop)[0] for text in expected]
    assert found == expected and sizes[0] == 5 and sizes[-1] <= 2


def test_the_end_token_ends_a_text_and_is_not_part_of_it(tokenizer):
    model = built("gpt2")
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    second = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)[0, -2]
    model.generation_config.eos_token_id = int(second)
    (found,) = written(model, tokenizer, PROMPTS[:1], max_new_tokens=10)
    assert tokenizer(found, add_special_tokens=False)["input_ids"].__len__() <= 2


def test_prompts_are_cut_on_the_left_to_leave_room_for_what_is_written(tokenizer):
    model, long = built("llama"), "Leo has the bell. " * 30
    assert len(tokenizer(long)["input_ids"]) > POSITIONS
    assert written(model, tokenizer, [long], max_new_tokens=20) == [by_transformers(model, tokenizer, long, 20)]


def test_small_batches_and_the_lack_of_memory_change_nothing(tokenizer):
    model = built("llama")
    whole = written(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert written(model, tokenizer, PROMPTS, max_new_tokens=12, batch_rows=2) == whole
    forward = model.forward

    def limited(*args, input_ids=None, **kwargs):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    model.forward = limited
    assert written(model, tokenizer, PROMPTS, max_new_tokens=12) == whole


@pytest.mark.parametrize("slack", [1, 64])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_new_prompt_takes_the_place_of_a_row_that_is_done(kind, slack, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "SLACK", slack)  # little room: what nobody sees is dropped often
    model, sizes = built(kind), []
    prompts = [f"{prompt} {word}" for prompt in PROMPTS for word in ("and", "has the bell", "the red coat . Leo", "")]
    whole = written(model, tokenizer, prompts, max_new_tokens=40, batch_rows=1)
    pieces = (text[at : at + 2] for text in whole for at in range(3, len(text) - 2, 9))
    stops = [piece for piece in dict.fromkeys(pieces) if piece.isascii() and piece.isprintable()][:4]
    expected = list(whole)
    for stop in stops:
        expected = [text.split(stop)[0] for text in expected]
    model.register_forward_pre_hook(lambda _m, _a, kw: sizes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    assert written(model, tokenizer, prompts, max_new_tokens=40, batch_rows=3, stops=stops) == expected
    assert whole != expected and max(rows for rows, _ in sizes) == 3
    steps = [rows for rows, tokens in sizes if tokens == 1]
    first = [tokens > 1 for _, tokens in sizes].index(False)
    assert any(tokens > 1 for _, tokens in sizes[first:]) and steps[-1] <= 3
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    assert len(set(lengths)) > 2, "texts of different lengths"


def test_prompts_are_read_as_many_at_a_time_as_is_fast(tokenizer, monkeypatch):
    model, sizes = built("llama"), []
    whole = written(model, tokenizer, PROMPTS, max_new_tokens=8)
    monkeypatch.setattr(generation.scoring, "fast_tokens", lambda model, kind: 1)
    model.register_forward_pre_hook(lambda _m, _a, kw: sizes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    assert written(model, tokenizer, PROMPTS, max_new_tokens=8) == whole
    assert [rows for rows, _ in sizes[:6]] == [1, 1, 1, 1, 1, 5]


def test_keys_and_values_are_written_in_place(tokenizer):
    cache = generation._cache(built("llama"), 8)
    layer = cache.layers[0]
    drawn = torch.randn(2, 2, 5, 4)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        keys, values = cache.update(drawn[:, :, part], 2 * drawn[:, :, part], 0)
    torch.testing.assert_close(keys, drawn)
    torch.testing.assert_close(values, 2 * drawn)
    where = layer.rooms[0].data_ptr()
    cache.update(drawn[:, :, :1], drawn[:, :, :1], 0)
    assert layer.rooms[0].data_ptr() == where and layer.get_seq_length() == 6
    layer.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(layer.keys[:, :, :5], drawn[1:])


def test_stop_is_heard_and_nonsense_is_refused(tokenizer):
    model = built("llama")
    with pytest.raises(Interrupted, match="5 texts unfinished"):
        written(model, tokenizer, PROMPTS, max_new_tokens=4, should_stop=lambda: True)
    with pytest.raises(ValueError, match=f"less than the model's {POSITIONS} tokens, got {POSITIONS}"):
        written(model, tokenizer, PROMPTS, max_new_tokens=POSITIONS)


def test_an_end_token_that_is_no_special_token_of_the_tokenizer_does_not_become_a_stop_string(tokenizer):
    model = built("llama")
    model.generation_config.eos_token_id = [tokenizer("e", add_special_tokens=False)["input_ids"][0], 299]
    plain = written(built("llama"), tokenizer, PROMPTS[:2], max_new_tokens=12)
    for found, whole in zip(written(model, tokenizer, PROMPTS[:2], max_new_tokens=12), plain, strict=True):
        assert whole.startswith(found)
