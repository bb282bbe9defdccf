"""Does the pruned model really do what it says? Checked on the user's own model while it runs.

Each fact looks at the model from outside (hooks on the projections, plain transformers, the files on disk), not through
the code that it checks, and says OK or FAILED with the number it saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from nbhelpers import adapters, attention, compact, data, evaluate, heads, masks, memory, models, scoring
from nbhelpers.architecture import geometry
from nbhelpers.attention import Head

GREEDY_TOKENS = 16  # written by a compact model and by the gated one, to be the same
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Fact:
    """`says` is the claim, `saw` what was measured; a fact that is not ok makes the run a violation."""

    name: str
    ok: bool
    says: str
    saw: str
    values: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)

    def line(self) -> str:
        return f"{'OK    ' if self.ok else 'FAILED'} {self.says}: {self.saw}"


@torch.inference_mode()
def logits(model: nn.Module, rows: Sequence[dict]) -> torch.Tensor:
    """(batch, length, vocabulary) float32 on the CPU."""
    batch = data.collate(rows, next(model.parameters()).device)
    with evaluate.evaluation_mode(model):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.logits.float().cpu()


def tolerance(model: nn.Module) -> float:
    """Largest relative difference that another order of summation explains at the model's precision."""
    return RELATIVE_TOLERANCE.get(next(model.parameters()).dtype, 1e-5)


def gates_change_nothing_while_open(model: nn.Module, rows: Sequence[dict]) -> Fact:
    """The same logits with the gated attention as with transformers' own."""
    ours = logits(model, rows)
    model.set_attn_implementation("sdpa")
    try:
        stock = logits(model, rows)
    finally:
        model.set_attn_implementation(attention.IMPLEMENTATION)
    difference = (ours - stock).abs().max().item() / max(stock.abs().max().item(), 1e-30)
    return Fact(
        "open_gates_are_transparent",
        difference <= tolerance(model),
        "with no further head closed the gated model is transformers' own model",
        f"largest relative difference of the logits {difference:.1e}",
        {"relative_difference": difference},
    )


def strategy_sees_the_model(model: nn.Module, rows: Sequence[dict], strategy: str, seed: int) -> Fact:
    """A head planted dead gets the score of a dead head (random: the scores follow the seed and nothing else)."""
    closed = set(attention.closed_heads(model))
    geo = geometry(model.config)
    candidates = heads.all_heads(geo.layers, geo.heads)[::-1]
    head = next((head for head in candidates if head not in closed), candidates[0])
    if strategy == "random":
        first, again, other = (heads.STRATEGIES["random"](model, rows, seed=at) for at in (seed, seed, seed + 1))
        return Fact(
            "strategy_is_the_one_asked_for",
            torch.equal(first, again) and not torch.equal(first, other),
            "random scores follow from the seed",
            f"seed {seed}",
        )
    found, score = heads.finds_dead_head(model, rows, strategy, head, seed)
    return Fact(
        "strategy_is_the_one_asked_for",
        found,
        f"strategy {strategy} finds a head that was planted dead",
        f"head {head} scored {score:.2g}, a dead head scores 0",
        {"head": list(head), "score": score},
    )


def lowest_scores_were_closed(selection: heads.Selection, kv_groups: bool, min_per_layer: int) -> Fact:
    """In every round no head (KV group: its mean) that could have gone instead scored below one that was closed:
    another of the same layer, or of a layer that has more than its minimum left. Groups go whole, nothing goes twice.
    """
    broken = 0
    gone = set(selection.closed) - set(selection.newly_closed)  # closed before there were any scores
    size = selection.group_size if kv_groups else 1
    for number in selection.rounds:
        scores = torch.tensor(number["scores"], dtype=torch.float64)
        now = {tuple(head) for head in number["closed"]}
        broken += len(now & gone)
        gone |= now
        layers, count = scores.shape
        left = [count - sum(other == layer for other, _ in gone) for layer in range(layers)]
        broken += any(left[layer] < min_per_layer for layer, _ in now)
        closed, kept = [], []
        for layer, start in [(layer, start) for layer in range(layers) for start in range(0, count, size)]:
            unit, mean = {(layer, start + at) for at in range(size)}, scores[layer, start : start + size].mean().item()
            if unit & now:
                broken += not unit <= now
                closed.append((layer, mean))
            elif not unit & gone:
                kept.append((layer, mean))
        broken += sum(
            kept_mean < mean and (other == layer or left[other] - size >= min_per_layer)
            for layer, mean in closed
            for other, kept_mean in kept
        )
    total = len(selection.newly_closed)
    return Fact(
        "least_important_heads_were_closed",
        not broken,
        "the closed heads are those with the lowest scores",
        f"{total} heads in {len(selection.rounds)} rounds"
        + (", whole groups or a minimum per layer" if kv_groups or min_per_layer else ""),
    )


def pruning_changed_the_logits(before: torch.Tensor, after: torch.Tensor, closed: Sequence[Head]) -> Fact:
    """Closing heads changed what the model computes (with none closed: changed nothing)."""
    difference = (before - after).abs().max().item()
    return Fact(
        "pruning_changed_the_logits",
        (difference > 0) == bool(closed),
        "closing the heads changed the logits" if closed else "no head closed, no logit changed",
        f"largest difference {difference:.3g}",
        {"difference": difference},
    )


def closed_heads_add_nothing(model: nn.Module, rows: Sequence[dict], closed: Sequence[Head], stage: str) -> Fact:
    """What reaches the output projection from the closed heads is exactly 0, and from the open ones it is not."""
    with attention.head_outputs(model) as largest:
        logits(model, rows)
    shut = set(closed)
    others = largest.numel() - len(shut)
    from_closed = max((largest[head].item() for head in shut), default=0.0)
    alive = sum(largest[head].item() > 0 for head in heads.all_heads(*largest.shape) if head not in shut)
    return Fact(
        f"closed_heads_add_nothing_{stage}",
        from_closed == 0 and alive == others,
        f"{stage.replace('_', ' ')}: the {len(shut)} closed heads add exactly 0, the other {others} do not",
        f"largest output of a closed head {from_closed:g}, open heads at work {alive}",
        {"closed": len(shut), "largest": from_closed, "open_at_work": alive},
    )


def removal_changed_nothing(gated: nn.Module, narrow: nn.Module, rows: Sequence[dict]) -> Fact:
    """The compact model gives the gated model's logits, and writes the same greedy tokens with a KV cache.

    Tokens may part where the gated model itself holds them equal at its precision.
    """
    before, after = logits(gated, rows), logits(narrow, rows)
    difference = (before - after).abs().max().item() / max(before.abs().max().item(), 1e-30)
    ids = rows[0]["input_ids"]
    start = max(1, len(ids) // 2)
    count = max(1, min(GREEDY_TOKENS, len(ids) - start))
    steps, others = (_greedy_steps(model, ids[:start], count) for model in (gated, narrow))
    written, again = steps.argmax(-1), others.argmax(-1)
    apart = (written != again).nonzero().flatten().tolist()
    gap = 0.0
    if apart:
        step = steps[apart[0]]
        gap = (step.max() - step[again[apart[0]]]).item() / max(step.abs().max().item(), 1e-30)
    same_tokens = gap <= 2 * tolerance(gated)  # each of the two logits may be off by the tolerance
    return Fact(
        "removal_changed_nothing",
        difference <= tolerance(gated) and same_tokens,
        "the model without the heads computes what it computed with them closed",
        f"largest relative difference of the logits {difference:.1e}, {count} greedy tokens with a KV cache "
        + ("equal" if not apart else "equal but for a tie" if same_tokens else f"differ from token {apart[0]} on"),
        {"relative_difference": difference, "tokens": count, "tokens_gap": gap},
    )


@torch.inference_mode()
def _greedy_steps(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """(tokens, vocabulary) logits of greedy writing with a KV cache, positions counted by the cache alone."""
    ids, cache, steps = prompt[None].to(next(model.parameters()).device), None, []
    with evaluate.evaluation_mode(model):
        for _ in range(tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            steps.append(output.logits[0, -1].float().cpu())
            ids, cache = steps[-1].argmax().view(1, 1).to(ids.device), output.past_key_values
    return torch.stack(steps)


def removal_made_it_smaller(parameters: tuple[int, int], size: tuple[int, int], removed: int) -> Fact:
    """(before, after) of the parameters and of the bytes of weights on disk; equal where no head was removed."""
    fell = [after < before if removed else after == before for before, after in (parameters, size)]
    return Fact(
        "removal_made_it_smaller",
        all(fell),
        f"{removed} removed heads took their parameters and bytes with them",
        f"parameters {parameters[0]:,} -> {parameters[1]:,}, bytes of weights {size[0]:,} -> {size[1]:,}",
        {"parameters": list(parameters), "bytes": list(size)},
    )


def saved_model_is_the_same(
    folder: str | Path,
    rows: Sequence[dict],
    nll: float,
    closed: Sequence[Head],
    device: str,
    *,
    removal: compact.Removal | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Fact]:
    """Loaded again through us: the same heads closed, the same loss; through plain transformers: the same loss.

    `removal`: what was removed from the saved model, so what must be gone from the loaded one; where its config cannot
    say it, plain transformers is not asked. Raises Interrupted after should_stop.
    """
    found = [_reloaded(folder, rows, nll, closed, device, removal, should_stop)]
    if adapters.base_of(folder) is not None:
        return [*found, _peft(folder, rows, nll, device, should_stop)]
    if removal is None or removal.loads_with == compact.PLAIN:
        found.append(_plain(folder, rows, nll, device, should_stop))
    return found


def _reloaded(
    folder: str | Path, rows: Sequence[dict], nll: float, closed: Sequence[Head], device: str, removal, should_stop
) -> Fact:
    with memory.loaded(lambda: models.load_model(str(folder), device=device, dtype="stored").model) as model:
        same_heads = attention.closed_heads(model) == sorted(closed) and compact.removal(model) == removal
        again = evaluate.perplexity(model, rows, should_stop=should_stop).nll
        ok = same_heads and abs(again - nll) <= tolerance(model) * max(1.0, abs(nll))
    what = "closed" if removal is None else "removed"
    return Fact(
        "reloaded_model_is_the_same",
        ok,
        f"the saved model, loaded again, has the same heads {what} and the same loss",
        f"{what} heads {'equal' if same_heads else 'differ'}, nll {again:.6f} against {nll:.6f}",
        {"nll": again, "expected": nll, "same_heads": same_heads},
    )


def _plain(folder: str | Path, rows: Sequence[dict], nll: float, device: str, should_stop) -> Fact:
    from transformers import AutoModelForCausalLM

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).to(device).eval()

    says = "the saved model has the same loss in plain transformers"
    return _same_loss("plain_transformers_computes_the_same", says, load, rows, nll, should_stop)


def _peft(folder: str | Path, rows: Sequence[dict], nll: float, device: str, should_stop) -> Fact:
    from peft import PeftModel

    below = adapters.base_of(folder)

    def load() -> nn.Module:
        base = models.load_model(
            below["model"], device=device, dtype=below.get("dtype") or "auto", quantization=below["quantization"]
        )
        with adapters.quiet_peft():
            return PeftModel.from_pretrained(base.model, str(folder)).eval()

    says = "the saved adapters, put by PEFT on the model below, have the same loss"
    return _same_loss("peft_computes_the_same", says, load, rows, nll, should_stop)


def _same_loss(name: str, says: str, load: Callable[[], nn.Module], rows, nll: float, should_stop) -> Fact:
    with memory.loaded(load) as model:
        again = evaluate.perplexity(model, rows, should_stop=should_stop).nll
        ok = abs(again - nll) <= tolerance(model) * max(1.0, abs(nll))
    return Fact(name, ok, says, f"nll {again:.6f} against {nll:.6f}", {"nll": again, "expected": nll})


def saved_logits_are_the_same(
    name: str,
    says: str,
    folder: str | Path,
    row: Mapping[str, torch.Tensor],
    before: torch.Tensor,
    device: str,
    allowed: float,
) -> Fact:
    """A saved model's logits of one row beside those `before` it was saved, as a share of the largest.

    Loaded by plain transformers; by load_model where the folder holds adapters, or a model with parts removed.
    """
    from transformers import AutoModelForCausalLM

    plain = adapters.base_of(folder) is None and not (Path(folder) / compact.RECORD_FILE).exists()

    def load() -> nn.Module:
        if plain:
            return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).to(device).eval()
        return models.load_model(str(folder), device=device, dtype="stored").model

    with memory.loaded(load) as model:
        apart = float((logits(model, [row]) - before).abs().max() / before.abs().max())
    return Fact(
        name,
        math.isfinite(apart) and apart <= allowed,
        says + ", in plain transformers" * plain,
        f"largest difference of logits {apart:.1e} of the largest",
        {"difference": apart, "allowed": allowed},
    )


def loss_is_the_models_own(check: dict[str, float], packing: str) -> Fact:
    """A few training rows before the first step: the loss as it is trained on (packed, logits only where labels are)
    beside that of the model's own logits, each row alone."""
    difference = abs(check["ours"] - check["own"]) / max(abs(check["own"]), 1e-30)
    return Fact(
        "loss_is_the_models_own",
        difference <= check["tolerance"],
        "rows that share a sequence do not see each other: the trained loss is that of each row alone",
        f"relative difference {difference:.1e} over {check['rows']:.0f} rows, packing {packing.split(':')[0]}",
        {**check, "relative_difference": difference},
    )


@torch.inference_mode()
def choices_score_as_alone(model: nn.Module, questions: Sequence[scoring.Question]) -> Fact:
    """A few questions: log-likelihoods of choices that share their context beside those of rows of their own, taken
    from the model's logits."""
    says = "choices that share their context are as likely as each in a row of its own"
    return _score_alike("choices_score_as_alone", says, "choices", model, questions)


def texts_score_as_the_model_reads_them(model: nn.Module, windows: Sequence[scoring.Question]) -> Fact:
    """A few windows of texts: their log-likelihoods beside those taken from the model's logits."""
    says = "windows of texts are as likely as the model's own logits say"
    return _score_alike("texts_score_as_the_model_reads_them", says, "windows", model, windows)


def _score_alike(name: str, says: str, what: str, model: nn.Module, questions: Sequence[scoring.Question]) -> Fact:
    """Log-likelihoods of choices beside those of rows of their own, in nats. what: how the choices are called."""
    shared = dict(scoring.loglikelihoods(model, questions))
    limit, device, apart = scoring.longest_text(model), next(model.parameters()).device, 0.0
    for number, asked in enumerate(questions):
        for at, choice in enumerate(asked.choices):
            ids = torch.tensor([(asked.context + choice)[-(limit + 1) :][:-1]], device=device)
            logs = model(input_ids=ids, use_cache=False).logits[0, -len(choice) :].float().log_softmax(-1)
            own = sum(logs[place, token].item() for place, token in enumerate(choice))
            apart = max(apart, abs(shared[number][at] - own))
    longest = max(len(choice) for asked in questions for choice in asked.choices)
    allowed = max(1e-3, 1e-5 * longest) if next(model.parameters()).dtype == torch.float32 else 0.5
    count = sum(len(asked.choices) for asked in questions)
    saw = f"largest difference {apart:.1e} nats over {count} {what}"
    return Fact(name, apart <= allowed, says, saw, {"difference": apart, "allowed": allowed})


def mask_holds(model: nn.Module, mask) -> Fact:
    """Every weight that the mask leaves out is zero in this model, as it is now."""
    found = masks.verify(model, mask)
    return Fact(
        "mask_holds_in_the_evaluated_model",
        found["ok"],
        "in the model that was evaluated every weight that the mask leaves out is zero",
        f"{found['violations']:,} violations in {found['layers']} layers",
        {"violations": found["violations"], "layers": found["layers"]},
    )


def texts_are_disjoint(corpus: data.Corpus) -> Fact:
    shared = data.overlap(corpus)
    found = f"{shared} of {len(corpus.test)} shared"
    if corpus.left_out is not None:
        found += f", {corpus.left_out} left out of the training text beforehand"
    return Fact(
        "test_text_was_not_trained_on",
        shared == 0,
        "no test document stands in the training or validation text",
        found,
        {"shared": shared},
    )


def loss_leaves_out_the_prompt(report: dict) -> Fact:
    """Counted on the rows that training really used (training.label_report)."""
    leaked = report["prompt_label_tokens"]
    return Fact(
        "loss_is_on_the_completion_alone",
        leaked == 0,
        "no prompt token is in the training loss",
        f"{leaked} prompt tokens among {report['label_tokens']} trained ones",
        dict(report),
    )


def same_budget(tuned, control) -> Fact:
    """The control saw as many steps and tokens as the pruned model."""
    pruned, whole = (tuned.steps, tuned.label_tokens), (control.steps, control.label_tokens)
    return Fact(
        "control_had_the_same_budget",
        pruned == whole,
        "the unpruned control was fine-tuned with the same budget",
        f"{pruned[0]} and {whole[0]} steps, {pruned[1]} and {whole[1]} tokens",
    )
