"""Which label does a model give a dialogue? Ranked by log-probability, and written freely and read for its label.

Ranking scores every label of a closed set after one reading of the prompt; the answer is always one of the labels. A
written answer is what a user would see: read for the one label that it names, it may hold none, which is its own case.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from nbhelpers import coding_metrics, facts, generation, icd10, memory, models, prompts, scoring, stats
from nbhelpers.dialogues import Dialogue
from nbhelpers.evaluate import evaluation_mode
from nbhelpers.prompts import Prompts, written

CHECKED_CHOICES = 8  # labels of a prompt that are scored a second time, each alone
KINDS = ("ranking", "writing")


NOT_TIMED = dict.fromkeys(("seconds_per_dialogue", "dialogues_per_second", "prompt_tokens_per_second", "spread"))


@dataclass(frozen=True)
class Speed:
    """seconds: of answering `dialogues` in batches; prompt_tokens: real tokens read, padding excluded.

    parts: (seconds, prompt tokens) of each part that was timed; what was prepared for all of them is in none. There are
    none where a run was stopped and went on: what was left is not like the rest.
    """

    seconds: float
    dialogues: int
    prompt_tokens: int
    parts: Sequence[tuple[float, int]] = ()

    def record(self) -> dict[str, Any]:
        return {
            "seconds_per_dialogue": self.seconds / self.dialogues,
            "dialogues_per_second": self.dialogues / self.seconds,
            "prompt_tokens_per_second": self.prompt_tokens / self.seconds,
            "spread": self.spread(),
        }

    def spread(self, confidence: float = 0.95) -> dict[str, float | int] | None:
        """Interval of the seconds a dialogue, from how the parts differ; None with fewer than two.

        {"low", "high", "parts"}. Dialogues of a part are of like length and parts are not, so what is compared is
        seconds a token: r = sum(s) / sum(t), whose variance is that of a ratio (Cochran 1977, 2.11),
        K / (K - 1) * sum((s - r t)^2) / sum(t)^2, with Student's t of K - 1, and on a log scale, as no time is below
        0. A machine that is slower for the whole of one measurement than for that of another is not in it.
        """
        count = len(self.parts)
        if count < 2:
            return None
        seconds, tokens = (math.fsum(column) for column in zip(*self.parts, strict=True))
        rate = seconds / tokens
        squares = math.fsum((s - rate * t) ** 2 for s, t in self.parts)
        error = math.sqrt(count / (count - 1) * squares) / tokens
        times = math.exp(stats.student_t_quantile((1 + confidence) / 2, count - 1) * error / rate)
        low, high = ((self.seconds - seconds + one) / self.dialogues for one in (seconds / times, seconds * times))
        return {"low": low, "high": high, "parts": count}


class Clock:
    """Seconds spent in an iterator of answers, not in what is done with what it gives; whole, and of each part.

    The work says where a part may end by asking `should_stop`, as it does between two passes. A part of rankings is a
    pass; texts are written side by side, so a part of them is at least as many as are at work at a time.
    """

    def __init__(self, kind: str, tokens: Sequence[int], should_stop: Callable[[], bool] | None = None) -> None:
        """tokens: of each prompt, by the number that its answer comes with."""
        self.tokens, self.seconds, self._stop = tokens, 0.0, should_stop
        self._since = time.perf_counter()
        self._parts: list[list[float]] = []  # seconds, answers, tokens
        self._least = generation.MOST_ROWS if kind == "writing" else 1

    def should_stop(self) -> bool:
        if not self._parts or self._parts[-1][1] >= self._least:
            self._tick()
            self._parts.append([0.0, 0, 0])
        return self._stop is not None and self._stop()

    def running(self, found: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        self._since = time.perf_counter()
        for number, one in found:
            self._tick()
            self._parts[-1][1] += 1
            self._parts[-1][2] += self.tokens[number]
            yield number, one
            self._since = time.perf_counter()
        self._tick()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        if self._parts:
            self._parts[-1][0] += now - self._since
        self._since = now

    def speed(self) -> Speed:
        """Of all that was answered; an unfinished last part counts to the one before it."""
        parts = [list(part) for part in self._parts]
        if len(parts) > 1 and parts[-1][1] < self._least:
            last = parts.pop()
            parts[-1] = [sum(pair) for pair in zip(parts[-1], last, strict=True)]
        timed = tuple((seconds, tokens) for seconds, _, tokens in parts)
        return Speed(self.seconds, sum(part[1] for part in parts), sum(part[2] for part in parts), timed)


def answered(
    model: nn.Module,
    prompts: Prompts,
    rows: Sequence[Dialogue],
    kinds: Sequence[str],
    *,
    batch_tokens: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, part of its line) of each row, for each of `kinds`; not in order.

    ranking: {"ranked", "probability", "logprobs"}: log-probabilities of all labels in their order, normalised over
    them. writing: {"written", "said"}: the label that was read, or None, and the text.
    """
    asked = [prompts.prompt(row.text).ids for row in rows]
    with evaluation_mode(model):
        if "ranking" in kinds:
            choices = tuple(prompts.answers.values())
            made = [scoring.Question(ids, choices) for ids in asked]
            for number, values in scoring.loglikelihoods(
                model, made, batch_tokens=batch_tokens, should_stop=should_stop
            ):
                yield number, ranked(values, prompts.labels)
        if "writing" in kinds:
            stops = () if prompts.chat else ("\n",)
            for number, text in generation.continuations(
                model,
                prompts.tokenizer,
                asked,
                stops=stops,
                max_new_tokens=prompts.room,
                end_tokens=() if prompts.end is None else (prompts.end,),
                should_stop=should_stop,
            ):
                yield number, {"written": read(text, prompts.wording.kind, prompts.labels), "said": text.strip()}


def ranked(values: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    """A line's ranking of these log-likelihoods (nats, one a label); labels with the same one in their order.

    FloatingPointError where one is no number: a model that computes none has not answered.
    """
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        first = labels[int(np.argmin(np.isfinite(found)))]
        raise FloatingPointError(f"the log-likelihood of label {first!r} is no number; try dtype float32")
    normal = found - np.logaddexp.reduce(found)
    order = np.argsort(-normal, kind="stable")[: coding_metrics.RANKS]
    return {
        "ranked": [labels[at] for at in order],
        "probability": min(1.0, float(np.exp(normal[order[0]]))),
        "logprobs": normal.astype(np.float32),
    }


def read(text: str, kind: str, labels: Sequence[str]) -> str | None:
    """The label that a written answer names; None where it names none, or several and begins with none of them."""
    if kind == "icd10":
        return icd10.extract(text, known=frozenset(labels))
    said = text.strip()
    first = said.splitlines()[0].strip(" \t.\"'*`") if said else ""
    exact = {label.casefold(): label for label in labels}
    if first.casefold() in exact:
        return exact[first.casefold()]
    found, rest = [], said
    for label in sorted(labels, key=lambda label: (-len(label), label)):  # the longest first: one may hold another
        pattern = rf"(?<![\w/]){re.escape(written(label, kind))}(?![\w/])"
        rest, times = re.subn(pattern, " ", rest, flags=re.IGNORECASE)
        if times:
            found.append(label)
    return found[0] if len(found) == 1 else None


def latency(
    model: nn.Module, prompts: Prompts, rows: Sequence[Dialogue], kind: str, *, should_stop=None
) -> dict[str, float | int]:
    """Seconds of one request at a time, the prompt's tokens included: {"p50", "p95", "p99", "n", "kind"}."""
    seconds = []
    for number, row in enumerate([*rows[:1], *rows]):  # the first one warms up and is not counted
        started = time.perf_counter()
        for _ in answered(model, prompts, [row], (kind,), should_stop=should_stop):
            pass
        if number:
            seconds.append(time.perf_counter() - started)
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "n": len(seconds), "kind": kind}


def ask(name: str, dialogues: Sequence[str], *, device: str | None = None, should_stop=None) -> list[dict[str, Any]]:
    """What a tuned model answers, asked as it was taught: {"ranked", "probability", "written", "said"} a dialogue.

    name: a folder with a tuned model and its prompt.json, or the one around it. The model's memory is given back.
    """
    taught = prompts_of(name)
    rows = [Dialogue(number, number, text, (), number) for number, text in enumerate(dialogues)]
    found: list[dict[str, Any]] = [{} for _ in rows]
    with memory.loaded(lambda: models.load_model(name, device=device)) as loaded:
        for number, more in answered(loaded.model, taught, rows, KINDS, should_stop=should_stop):
            found[number] |= {key: value for key, value in more.items() if key != "logprobs"}
    return found


def prompts_of(name: str) -> Prompts:
    """The prompts that a tuned model was taught with."""
    return prompts.load(models.locate(name)[1], models.load_tokenizer(name))


# Facts ----------------------------------------------------------------------------------------------------------------


def labels_score_as_alone(model: nn.Module, prompts: Prompts, rows: Sequence[Dialogue]) -> facts.Fact:
    """Some labels of a prompt, scored together and each in a row of its own."""
    choices = tuple(prompts.answers.values())[:CHECKED_CHOICES]
    few = [scoring.Question(prompts.prompt(row.text).ids, choices) for row in rows[:1]]
    return facts.choices_score_as_alone(model, few)


def trained_as_asked(prompts: Prompts, rows: Sequence[Dialogue], trained: Sequence[dict]) -> facts.Fact:
    """Does each training row begin with the tokens that inference asks with, and is the loss on the answer alone?

    rows, trained: the dialogues and the rows that were given to training, in one order.
    """
    same = answer = 0
    for row, taught in zip(rows, trained, strict=True):
        ids, labels = taught["input_ids"].tolist(), taught["labels"].tolist()
        asked = list(prompts.prompt(row.text).ids)
        scored = [token for token, label in zip(ids, labels, strict=True) if label == token]
        same += ids[: len(asked)] == asked
        answer += any(scored == list(prompts.answers[label]) for label in row.labels) and labels[: len(asked)] == [
            -100
        ] * len(asked)
    return facts.Fact(
        name="trained_as_asked",
        ok=same == answer == len(rows) > 0,
        says="training rows begin with the inference prompt token for token, and only label and end token are taught",
        saw=f"{same} of {len(rows)} rows begin so, in {answer} the loss is on the answer alone",
        values={"rows": len(rows), "same_prompt": same, "answer_alone": answer},
    )
