"""What does a model write after each of many prompts, greedily, until a stop string?

Prompts of like length go together, padded on the left; keys and values lie in room made once for the whole text, where
a growing cache would copy all of it at every token; a row that has reached its end leaves the batch. Truncation, stop
strings and what is cut off are those of lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nbhelpers import attention, memory
from nbhelpers.scoring import longest_text
from nbhelpers.tracking import Interrupted

CACHE_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # most keys and values held at a time; it sets the batch size
MOST_ROWS = 64
LEAVE_SHARE = 0.25  # finished rows leave once they are this share of a batch: leaving copies the others' keys


@dataclass
class _Row:
    number: int
    prompt: list[int]
    written: list[int] = field(default_factory=list)


@torch.inference_mode()
def continuations(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    stops: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_rows: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, str]]:
    """(number, text) of each prompt as it is done: what the model writes, likeliest token by likeliest token.

    model: in evaluation mode. A text ends before the first of its stop strings, before the end token, or after
    max_new_tokens. Prompts are cut on the left to what the model reads at once less max_new_tokens. When memory ends,
    the batch is split. Interrupted after should_stop, between tokens.
    """
    room = longest_text(model) - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens must be less than the model's {longest_text(model)} tokens, got {max_new_tokens}"
        )
    rows = [_Row(number, ids[-room:]) for number, ids in enumerate(tokenizer(list(prompts))["input_ids"])]
    empty = next((row.number for row in rows if not row.prompt), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no tokens; give at least one word")
    rows.sort(key=lambda row: (-len(row.prompt), row.number))
    ends = _end_tokens(model, tokenizer)
    stops = [*dict.fromkeys([*filter(None, stops), *(tokenizer.decode([end]) for end in ends)])]
    size = batch_rows or _batch_rows(model, len(rows[0].prompt) + max_new_tokens) if rows else 1
    for start in range(0, len(rows), size):
        yield from _split_where_memory_ends(
            model, tokenizer, rows[start : start + size], stops, ends, max_new_tokens, should_stop
        )


def _end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """The tokens that end a text: the model's own and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    own = getattr(own, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return [*dict.fromkeys(end for end in [*own, tokenizer.eos_token_id] if end is not None)]


def _batch_rows(model: nn.Module, length: int) -> int:
    """Rows whose keys and values stay within CACHE_BYTES."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = (getattr(text, "head_dim", None) or text.hidden_size // heads) * (
        getattr(text, "num_key_value_heads", None) or heads
    )
    parameter = next(model.parameters())
    a_row = 2 * text.num_hidden_layers * width * length * parameter.element_size()
    return max(1, min(MOST_ROWS, CACHE_BYTES.get(parameter.device.type, CACHE_BYTES["cpu"]) // a_row))


def _split_where_memory_ends(model, tokenizer, rows: list[_Row], *rest) -> Iterator[tuple[int, str]]:
    told: set[int] = set()
    try:
        for number, text in _write(model, tokenizer, rows, *rest):
            told.add(number)
            yield number, text
        return
    except Exception as error:
        if not memory.is_oom(error) or len(rows) == 1:
            raise
    gc.collect()
    left = [_Row(row.number, row.prompt) for row in rows if row.number not in told]
    for part in (left[: len(left) // 2], left[len(left) // 2 :]):
        if part:
            yield from _split_where_memory_ends(model, tokenizer, part, *rest)


def _write(model, tokenizer, rows, stops, ends, max_new_tokens, should_stop) -> Iterator[tuple[int, str]]:
    device = next(model.parameters()).device
    longest = max(len(row.prompt) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    seen = torch.zeros(len(rows), longest + max_new_tokens, dtype=torch.long)
    for at, row in enumerate(rows):
        tokens[at, longest - len(row.prompt) :] = torch.tensor(row.prompt)
        seen[at, longest - len(row.prompt) :] = 1
    tokens, seen = tokens.to(device), seen.to(device)
    positions = (seen[:, :longest].cumsum(1) - 1).clamp(min=0)
    cache = _cache(model, longest + max_new_tokens)
    tail = max([len(stop.encode()) for stop in stops], default=0) + 2  # tokens that can hold the longest stop string
    active, length = list(rows), longest
    while active:
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped with {len(active)} texts unfinished")
        whole = bool(seen[:, :length].all())
        mask = {} if whole else {"attention_mask": seen[:, :length]}
        output = model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1, **mask
        )
        likeliest = output.logits[:, -1].argmax(-1)
        done = []
        for at, token in enumerate(likeliest.tolist()):
            row = active[at]
            if row is None:
                continue
            ended = token in ends
            if not ended:
                row.written.append(token)
            recent = tokenizer.decode(row.written[-tail:], skip_special_tokens=True)
            if ended or len(row.written) == max_new_tokens or any(stop in recent for stop in stops):
                yield row.number, _cut(tokenizer.decode(row.written, skip_special_tokens=True), stops)
                active[at] = None
                done.append(at)
        kept = [at for at, row in enumerate(active) if row is not None]
        if not kept:
            return
        if len(active) - len(kept) >= LEAVE_SHARE * len(active):
            keep = torch.tensor(kept, device=device)
            cache.batch_select_indices(keep)
            likeliest, positions, seen = likeliest[keep], positions[keep], seen[keep]
            active = [active[at] for at in kept]
        tokens, positions, length = likeliest[:, None], positions[:, -1:] + 1, length + 1


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


# Keys and values ------------------------------------------------------------------------------------------------------


class _Room(DynamicLayer):
    """Keys and values of one layer, written into room for `length` tokens that is made once."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.length)
            self.rooms = [s.new_empty(*shape, s.shape[-1]) for s in (key_states, value_states)]
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, start : self.filled] = states
        self.keys, self.values = (room[:, :, : self.filled] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rooms = [room[indices] for room in self.rooms]
        self.keys, self.values = (room[:, :, : self.filled] for room in self.rooms)


def _cache(model: nn.Module, length: int) -> DynamicCache:
    """A cache with room for `length` tokens; transformers' own where it is not known how the model attends."""
    cache = DynamicCache(config=model.config)
    if attention.is_installed(model):
        cache.layers = [_Room(length) for _ in range(model.config.get_text_config().num_hidden_layers)]
    return cache
