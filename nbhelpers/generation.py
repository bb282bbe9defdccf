"""What does a model write after each of many prompts, greedily, until a stop string?

Prompts of like length go together; keys and values lie in room made once for the whole text, where a growing cache
would copy all of it at every token; a row that has reached its end gives its place to the next prompt. Truncation, stop
strings and what is cut off are those of lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nbhelpers import attention, memory, scoring
from nbhelpers.tracking import Interrupted

CACHE_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # most keys and values held at a time; it sets the batch size
MOST_ROWS = 64
REFILL_SHARE = 0.125  # new prompts are read once this share of a batch is free: few at a time, but not too few
SLACK = 64  # tokens of room beyond the longest text, so that what nobody sees is dropped rarely
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
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    stops: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_rows: int | None = None,
    end_tokens: Sequence[int] = (),
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, str]]:
    """(number, text) of each prompt as it is done: what the model writes, likeliest token by likeliest token.

    model: in evaluation mode. prompts: texts, or their token ids. A text ends before the first of its stop strings,
    before the end token (the model's, the tokenizer's, or one of end_tokens), or after max_new_tokens. Prompts are cut
    on the left to what the model reads at once less max_new_tokens. When memory ends, the batch is split. Interrupted
    after should_stop, between tokens.
    """
    room = scoring.longest_text(model) - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens must be less than the model's {scoring.longest_text(model)} tokens, got {max_new_tokens}"
        )
    texts = all(isinstance(prompt, str) for prompt in prompts)
    ids = scoring.encode(tokenizer, prompts) if texts else prompts
    rows = [_Row(number, list(prompt[-room:])) for number, prompt in enumerate(ids)]
    empty = next((row.number for row in rows if not row.prompt), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no tokens; give at least one word")
    rows.sort(key=lambda row: (-len(row.prompt), row.number))
    ends = [*dict.fromkeys([*_end_tokens(model, tokenizer), *end_tokens])]
    named = [tokenizer.decode([end]) for end in ends if end in tokenizer.all_special_ids]
    stops = [*dict.fromkeys([*filter(None, stops), *filter(None, named)])]
    size = batch_rows or _batch_rows(model, len(rows[0].prompt) + max_new_tokens) if rows else 1
    told: set[int] = set()
    while True:
        left = [_Row(row.number, row.prompt) for row in rows if row.number not in told]
        try:
            for number, text in _write(model, tokenizer, left, size, stops, ends, max_new_tokens, should_stop):
                told.add(number)
                yield number, text
            return
        except Exception as error:
            if not memory.is_oom(error) or size == 1:
                raise
        gc.collect()
        size = max(1, min(size, len(left)) // 2)


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


def _write(model, tokenizer, rows, size, stops, ends, max_new_tokens, should_stop) -> Iterator[tuple[int, str]]:
    """(number, text) of rows, longest prompts first, `size` at a time; a new one takes a done one's place."""
    if not rows:
        return
    tail = max([len(stop.encode()) for stop in stops], default=0) + 2  # tokens that can hold the longest stop string
    waiting, batch = deque(rows), _Batch(model, len(rows[0].prompt) + max_new_tokens + SLACK)
    while waiting or batch.active:
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped with {len(waiting) + batch.active} texts unfinished")
        free = size - batch.active
        if waiting and (not batch.active or (batch.refills and free >= REFILL_SHARE * size)):
            found = batch.join([waiting.popleft() for _ in range(min(free, len(waiting)))])
        else:
            found = batch.step()
        for slot, token in found:
            row = batch.rows[slot]
            ended = token in ends
            if not ended:
                row.written.append(token)
            recent = tokenizer.decode(row.written[-tail:], skip_special_tokens=True)
            if ended or len(row.written) == max_new_tokens or any(stop in recent for stop in stops):
                yield row.number, _cut(tokenizer.decode(row.written, skip_special_tokens=True), stops)
                batch.done(slot)
        if not waiting or not batch.refills:
            batch.shrink()


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


class _Batch:
    """Rows that are written side by side. Their texts end at one place, `length`, of the room for keys and values; what
    stands before a shorter text is not seen. rows: None where one is done and its slot is free."""

    def __init__(self, model: nn.Module, room: int) -> None:
        self.model, self.room = model, room
        self.device = next(model.parameters()).device
        self.refills = attention.is_installed(model)  # else it is not known how keys and values are kept
        self.rows: list[_Row | None] = []
        self.length = 0

    @property
    def active(self) -> int:
        return sum(row is not None for row in self.rows)

    def join(self, new: list[_Row]) -> list[tuple[int, int]]:
        """Read the prompts of new rows, not longer than those before; (slot, first token) of each."""
        if not self.active:
            self.rows, self.length = [None] * len(new), max(len(row.prompt) for row in new)
            self.seen = torch.zeros(len(new), self.room, dtype=torch.long, device=self.device)
            self.tokens = torch.zeros(len(new), dtype=torch.long, device=self.device)
            self.cache = _cache(self.model, self.room)
        slots = [slot for slot, row in enumerate(self.rows) if row is None][: len(new)]
        found = []
        for part in self._parts(new):
            here = slots[len(found) : len(found) + len(part)]
            found += zip(here, self._read(part, here), strict=True)
        return found

    def _parts(self, new: list[_Row]) -> Iterator[list[_Row]]:
        """As many prompts as are read fastest at a time; all where the model's own cache is used."""
        budget = scoring.fast_tokens(self.model, self.device.type)
        size = max(1, budget // len(new[0].prompt)) if self.refills else len(new)
        return (new[at : at + size] for at in range(0, len(new), size))

    def _read(self, part: list[_Row], slots: list[int]) -> list[int]:
        longest = max(len(row.prompt) for row in part)
        tokens = torch.zeros(len(part), longest, dtype=torch.long)
        seen = torch.zeros(len(part), longest, dtype=torch.long)
        for at, row in enumerate(part):
            tokens[at, longest - len(row.prompt) :] = torch.tensor(row.prompt)
            seen[at, longest - len(row.prompt) :] = 1
        mask = {} if bool(seen.all()) else {"attention_mask": seen.to(self.device)}
        own = _cache(self.model, longest) if self.refills else self.cache
        output = self.model(
            input_ids=tokens.to(self.device),
            position_ids=(seen.cumsum(1) - 1).clamp(min=0).to(self.device),
            past_key_values=own,
            use_cache=True,
            logits_to_keep=1,
            **mask,
        )
        if self.refills:
            for layer, read in zip(self.cache.layers, own.layers, strict=True):
                layer.place(read, slots, len(self.rows), self.length)
        at = torch.tensor(slots, device=self.device)
        self.seen[at] = 0
        self.seen[at, self.length - longest : self.length] = seen.to(self.device)
        self.tokens[at] = likeliest = output.logits[:, -1].argmax(-1)
        for slot, row in zip(slots, part, strict=True):
            self.rows[slot] = row
        return likeliest.tolist()

    def step(self) -> list[tuple[int, int]]:
        """One token more of each row: (slot, token)."""
        if self.length == self.room:
            self._move_to_the_front()
        self.seen[:, self.length] = 1
        self.length += 1
        seen = self.seen[:, : self.length]
        output = self.model(
            input_ids=self.tokens[:, None],
            position_ids=seen.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **({} if bool(seen.all()) else {"attention_mask": seen}),
        )
        self.tokens = output.logits[:, -1].argmax(-1)
        return [(slot, token) for slot, token in enumerate(self.tokens.tolist()) if self.rows[slot] is not None]

    def _move_to_the_front(self) -> None:
        """Drop what no row that is still written has seen."""
        alive = torch.tensor([row is not None for row in self.rows], device=self.device)
        unseen = int(self.seen[alive].argmax(1).min())
        for layer in self.cache.layers:
            layer.drop(unseen)
        self.seen = torch.cat([self.seen[:, unseen:], torch.zeros_like(self.seen[:, :unseen])], 1)
        self.length -= unseen

    def done(self, slot: int) -> None:
        """Free a slot: until it is taken it is written on from nothing, whose positions no model lacks."""
        self.rows[slot] = None
        self.seen[slot] = 0

    def shrink(self) -> None:
        """Take rows that are done out, once they are a share of the batch."""
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        if kept and len(self.rows) - len(kept) >= LEAVE_SHARE * len(self.rows):
            keep = torch.tensor(kept, device=self.device)
            self.cache.batch_select_indices(keep)
            self.tokens, self.seen = self.tokens[keep], self.seen[keep]
            self.rows = [self.rows[slot] for slot in kept]


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
            self.rooms = [s.new_zeros(*shape, s.shape[-1]) for s in (key_states, value_states)]
        start = self.filled
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, start : start + states.shape[-2]] = states
        self._fill(start + key_states.shape[-2])
        return self.keys, self.values

    def place(self, read: _Room, slots: list[int], rows: int, end: int) -> None:
        """Take over what another layer has read, to end at `end`, as these of `rows` rows."""
        if not self.is_initialized:
            self.lazy_initialization(read.keys, read.values)
            self.rooms = [s.new_zeros(rows, s.shape[1], self.length, s.shape[-1]) for s in (read.keys, read.values)]
        for room, states in zip(self.rooms, (read.keys, read.values), strict=True):
            room[slots, :, end - read.filled : end] = states
        self._fill(end)

    def drop(self, count: int) -> None:
        """Forget the first `count` tokens."""
        for room in self.rooms:
            room[:, :, : self.filled - count] = room[:, :, count : self.filled].clone()
        self._fill(self.filled - count)

    def _fill(self, filled: int) -> None:
        self.filled = filled
        self.keys, self.values = (room[:, :, :filled] for room in self.rooms)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rooms = [room[indices] for room in self.rooms]
        self._fill(self.filled)


def _cache(model: nn.Module, length: int) -> DynamicCache:
    """A cache with room for `length` tokens; transformers' own where it is not known how the model attends."""
    cache = DynamicCache(config=model.config)
    if attention.is_installed(model):
        cache.layers = [_Room(length) for _ in range(model.config.get_text_config().num_hidden_layers)]
    return cache
