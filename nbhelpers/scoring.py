"""How likely does a model find each choice after a context? Each context is read once for all of its choices.

A context and its choices become one tree of tokens: the context is the trunk, choices that begin alike share branches.
The tree stands in one row, depth first, so that token i may see token j exactly if j <= i < end[j], where end[j] is
where the branch of j ends; positions count from the root. What the model computes at each token is what it would in a
row of its own. The output projection runs only where a next token is scored.

Sums of log-probabilities, truncation and tokens at the border are those of lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from nbhelpers import attention, faster_layers, losses, memory, models
from nbhelpers.tracking import Interrupted

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # most padded tokens of a pass
ACTIVATION_BYTES = 6 * 2**20  # on a CPU, of the widest activation: more falls out of its cache, and is slower
BRANCH_TOKENS = 512  # more than this after a context, and its keys and values are kept while branches pass by in parts
UNLIMITED = 2048  # tokens of a text where neither config nor tokenizer name a limit, as in the harness

Seen = tuple[float, bool]  # log-probability of a token in nats, and whether it is the likeliest


@dataclass(frozen=True)
class Question:
    """A context and its choices as token ids; the choices begin after the context's last token."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def question(tokenizer, context: str, choices: Sequence[str]) -> Question:
    """Tokens of a context and its choices. ValueError names a choice without tokens.

    Spaces at the context's end go to the choices; a choice's tokens are those of context + choice from the context's
    number on. An empty context is the tokenizer's BOS (else EOS) token.
    """
    if not context:
        return _without_context(tokenizer, choices)
    stripped = context.rstrip()
    spaces = context[len(stripped) :]
    ids, *wholes = encode(tokenizer, [stripped, *(stripped + spaces + choice for choice in choices)])
    found = tuple(tuple(whole[len(ids) :]) for whole in wholes)
    return _checked(Question(tuple(ids), found), choices)


def text(tokenizer, whole: str, limit: int) -> list[Question]:
    """A text of which each token is scored, as questions of one choice: its `windows`. ValueError where the tokenizer
    has neither BOS nor EOS to stand before the first token."""
    start = first_token(tokenizer)
    if start is None:
        raise ValueError("the tokenizer has neither BOS nor EOS, so a text's first token has nothing to stand after")
    return windows(*encode(tokenizer, [whole]), start, limit)


def windows(ids: Sequence[int], start: int, limit: int) -> list[Question]:
    """Each token of a text scored once, in questions of one choice: the first `limit` after `start`, then as many
    again, each time after the one token before them, up to a last one that reaches back as far as the model reads."""
    made, done = [], 0
    while done < len(ids):
        end = min(len(ids), done + limit)
        before = (start,) if not done else tuple(ids[max(0, end - limit - 1) : done])
        made.append(Question(before, (tuple(ids[done:end]),)))
        done = end
    return made


def first_token(tokenizer) -> int | None:
    """What stands before a text's first token: BOS, else EOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as the tokenizer begins texts; one that is written with its BOS gets no second one."""
    if not texts:
        return []
    start = first_token(tokenizer)
    written = "" if start is None else tokenizer.decode([start])
    begun = [bool(written) and text.startswith(written) for text in texts]
    if not any(begun):
        return tokenizer(list(texts))["input_ids"]
    return [
        tokenizer(text, **({"add_special_tokens": False} if bare else {}))["input_ids"]
        for text, bare in zip(texts, begun, strict=True)
    ]


def _without_context(tokenizer, choices: Sequence[str]) -> Question:
    start = first_token(tokenizer)
    found = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    found = [ids[1:] if ids[:1] == [start] else ids for ids in found]
    return _checked(Question((start,), tuple(map(tuple, found))), choices)


def _checked(made: Question, choices: Sequence[str]) -> Question:
    for ids, choice in zip(made.choices, choices, strict=True):
        if not ids:
            raise ValueError(f"choice {choice!r} has no tokens of its own after its context, so nothing can be scored")
    if not made.context:
        raise ValueError("the context has no tokens and the tokenizer neither BOS nor EOS; give a context")
    return made


def longest_text(model: nn.Module) -> int:
    """Most tokens that the model reads at once: its positions, or UNLIMITED where its config names none."""
    return models.max_positions(model) or UNLIMITED


# Trees ----------------------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """One row: tokens, their positions and where their branches end, and which next tokens are scored where.

    wanted: (place in the row, next token, choice) of each scored token; trunk: tokens of the context.
    """

    tokens: list[int]
    positions: list[int]
    end: list[int]
    trunk: int
    wanted: list[tuple[int, int, int]] = field(default_factory=list)
    of: int = 0  # the question's number

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether some token does not see all tokens before it."""
        return any(end < len(self.tokens) for end in self.end)


def trees(asked: Question, number: int, limit: int, shared: bool = True) -> list[Tree]:
    """The question as trees, one for each place at which its context has to be cut on the left.

    shared: choices of one cut share their context; else each is a tree, a plain row, of its own.

    A choice is read with the last `limit` + 1 tokens of context and choice, without the very last one. ValueError for a
    choice longer than the limit.
    """
    cuts: dict[int, list[int]] = {}
    for at, choice in enumerate(asked.choices):
        if len(choice) > limit:
            raise ValueError(f"choice {at} has {len(choice)} tokens, more than the {limit} that the model reads")
        cuts.setdefault(max(0, len(asked.context) + len(choice) - limit - 1), []).append(at)
    groups = [(cut, part) for cut, ats in cuts.items() for part in ([ats] if shared else [[at] for at in ats])]
    return [_tree(asked.context[cut:], {at: asked.choices[at] for at in part}, number) for cut, part in groups]


def _tree(context: Sequence[int], choices: dict[int, tuple[int, ...]], number: int) -> Tree:
    trunk = len(context)
    tree = Tree(list(context), list(range(trunk)), [0] * trunk, trunk, of=number)

    def grow(place: int, depth: int, members: list[int]) -> None:
        """Score the next token of each member at `place`, and put those with more to come into the row."""
        groups: dict[int, list[int]] = {}
        for at in members:
            tree.wanted.append((place, choices[at][depth], at))
            if len(choices[at]) > depth + 1:
                groups.setdefault(choices[at][depth], []).append(at)
        for token, group in groups.items():
            here = len(tree.tokens)
            tree.tokens.append(token)
            tree.positions.append(trunk + depth)
            tree.end.append(0)
            if len(group) > 1:
                grow(here, depth + 1, group)
            else:
                run_out(here, depth + 1, group[0])
            tree.end[here] = len(tree.tokens)

    def run_out(place: int, depth: int, at: int) -> None:
        """The rest of a choice that shares its tokens with no other: a line without branches, however long."""
        rest, first = choices[at][depth:], len(tree.tokens)
        places = [place, *range(first, first + len(rest) - 1)]
        tree.wanted += [(where, token, at) for where, token in zip(places, rest, strict=True)]
        tree.tokens += rest[:-1]
        tree.positions += range(trunk + depth, trunk + depth + len(rest) - 1)
        tree.end += [first + len(rest) - 1] * (len(rest) - 1)

    grow(trunk - 1, 0, sorted(choices))
    tree.end[:trunk] = [len(tree.tokens)] * trunk
    return tree


# Passes ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def loglikelihoods(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    batch_tokens: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """(number, log-likelihoods) of each question, in nats, one a choice, unrounded; longest questions first.

    model: in evaluation mode. When memory ends, a pass is split. Interrupted after should_stop, between passes.
    """
    for number, values, _ in judged(model, questions, batch_tokens=batch_tokens, should_stop=should_stop):
        yield number, values


@torch.inference_mode()
def judged(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    batch_tokens: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, list[float], list[bool]]]:
    """(number, log-likelihoods, whether the model would have written the choice) as `loglikelihoods` says."""
    device = next(model.parameters()).device
    limit, budget = longest_text(model), batch_tokens or fast_tokens(model, device.type)
    found = [[0.0] * len(asked.choices) for asked in questions]
    greedy = [[True] * len(asked.choices) for asked in questions]
    shared = attention.is_installed(model)  # else it is not known how the model attends
    grown = [tree for number, asked in enumerate(questions) for tree in trees(asked, number, limit, shared)]
    left = [0] * len(questions)
    for tree in grown:
        left[tree.of] += 1
    for batch in _batches(grown, budget):
        if should_stop is not None and should_stop():
            raise Interrupted("stopped between two passes")
        with faster_layers.in_use(model, "fp32" if next(model.parameters()).dtype == torch.float32 else "other"):
            seen = _pass(model, batch, device)
        for tree, values in zip(batch, seen, strict=True):
            for (_, _, choice), (value, likeliest) in zip(tree.wanted, values, strict=True):
                found[tree.of][choice] += value
                greedy[tree.of][choice] &= likeliest
            left[tree.of] -= 1
            if not left[tree.of]:
                yield tree.of, found[tree.of], greedy[tree.of]


def fast_tokens(model: nn.Module, kind: str) -> int:
    """Padded tokens of a pass, by what is fastest: passes larger than the caches cost a CPU up to twice the time."""
    if kind != "cpu":
        return BATCH_TOKENS.get(kind, BATCH_TOKENS["cpu"])
    text = model.config.get_text_config()
    inner = [getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    widest = next(filter(None, inner), 4 * text.hidden_size)
    return max(256, min(BATCH_TOKENS["cpu"], ACTIVATION_BYTES // (4 * widest)))


def _batches(grown: list[Tree], budget: int) -> Iterator[list[Tree]]:
    """Longest first; as many rows as stay within the budget of padded tokens. Trees with large crowns go alone."""
    batch: list[Tree] = []
    for tree in sorted(grown, key=lambda tree: (-len(tree), tree.of)):
        alone = len(tree) - tree.trunk > BRANCH_TOKENS
        if batch and (alone or len(batch[0]) * (len(batch) + 1) > budget):
            yield batch
            batch = []
        if alone:
            yield [tree]
        else:
            batch.append(tree)
    if batch:
        yield batch


def _pass(model: nn.Module, batch: list[Tree], device: torch.device) -> list[list[Seen]]:
    """What is seen of each tree's wanted tokens. Out of memory: the halves one after the other."""
    try:
        large = len(batch) == 1 and len(batch[0]) - batch[0].trunk > BRANCH_TOKENS
        if large and batch[0].branches and _keeps_keys(model):
            return [_in_parts(model, batch[0], device)]
        return _at_once(model, batch, device)
    except Exception as error:
        if not memory.is_oom(error) or len(batch) == 1:
            raise
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return _pass(model, batch[:half], device) + _pass(model, batch[half:], device)


def _at_once(model: nn.Module, batch: list[Tree], device: torch.device) -> list[list[Seen]]:
    longest = max(len(tree) for tree in batch)
    tokens, positions = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
    end = torch.arange(1, longest + 1).repeat(len(batch), 1)  # padding sees itself
    for row, tree in enumerate(batch):
        part = slice(0, len(tree))
        tokens[row, part], positions[row, part] = torch.tensor(tree.tokens), torch.tensor(tree.positions)
        end[row, part] = torch.tensor(tree.end)
    inputs = {"input_ids": tokens.to(device)}
    if any(tree.branches for tree in batch):  # else plain rows: padding on the right is seen by nobody
        at = torch.arange(longest, device=device)
        visible = (at[None, :, None] >= at) & (at[None, :, None] < end.to(device)[:, None, :])
        positions = positions.to(device)
        inputs |= {"position_ids": positions}
        inputs |= attention.visible(model, visible, positions, positions)
    places = [(row, place) for row, tree in enumerate(batch) for place in sorted({at for at, _, _ in tree.wanted})]
    number = {place: at for at, place in enumerate(places)}
    wanted = [(number[row, place], token) for row, tree in enumerate(batch) for place, token, _ in tree.wanted]
    values = zip(*losses.log_probabilities(model, inputs, places, wanted), strict=True)
    return [[next(values) for _ in tree.wanted] for tree in batch]


def _keeps_keys(model: nn.Module) -> bool:
    """Whether keys and values of a context can be kept, whole: not where attention slides over a window."""
    return attention.is_installed(model) and not attention.windows(model)


def _in_parts(model: nn.Module, tree: Tree, device: torch.device) -> list[Seen]:
    """The context once, its keys and values kept, then the branches, about BRANCH_TOKENS tokens at a time."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    found: list[Seen | None] = [None] * len(tree.wanted)
    trunk = tree.trunk

    def run(start: int, stop: int) -> None:
        at = torch.arange(start, stop, device=device)
        keys = torch.cat([torch.arange(trunk, device=device), at]) if start else at
        end = torch.tensor(tree.end, device=device)
        visible = (at[:, None] >= keys) & (at[:, None] < end[keys])
        positions = torch.tensor(tree.positions, device=device)
        inputs = {"input_ids": torch.tensor([tree.tokens[start:stop]], device=device), "past_key_values": cache}
        inputs |= {"position_ids": positions[None, start:stop], "use_cache": True}
        inputs |= attention.visible(model, visible[None], positions[None, at], positions[None, keys])
        here = [n for n, (place, _, _) in enumerate(tree.wanted) if start <= place < stop]
        places = sorted({tree.wanted[n][0] for n in here})
        number = {place: n for n, place in enumerate(places)}
        wanted = [(number[tree.wanted[n][0]], tree.wanted[n][1]) for n in here]
        values = losses.log_probabilities(model, inputs, [(0, place - start) for place in places], wanted)
        for n, *seen in zip(here, *values, strict=True):
            found[n] = tuple(seen)
        if start:
            cache.crop(start - stop)  # negative: that many tokens go

    run(0, trunk)
    start = trunk
    for stop in _whole_branches(tree):
        run(start, stop)
        start = stop
    return found


def _whole_branches(tree: Tree) -> Iterator[int]:
    """Ends of parts of the crown, each of whole branches, of about BRANCH_TOKENS tokens (more where one is longer)."""
    start = at = tree.trunk
    while at < len(tree):
        at = tree.end[at]
        if at - start >= BRANCH_TOKENS or at == len(tree):
            yield at
            start = at
