"""How good is a model in memory at any task of lm-evaluation-harness? The harness asks and grades, this answers.

The extra `lmeval` has to be installed. Requests with one context are answered together: see scoring.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from nbhelpers import evaluate, generation, scoring

NEW_TOKENS = 256  # most tokens written where a task names no number, as in the harness
MISSING = "lm-evaluation-harness is not installed; pip install 'nbhelpers[lmeval]' (or: pip install lm_eval==0.4.13)"
GREEDY = ("until", "do_sample", "temperature")  # what a task may ask of writing beside the number of tokens
_IGNORED = ("top_p", "top_k")  # of no effect where the likeliest token is taken


def evaluate_with_harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include_path: str | Path | None = None,
    batch_tokens: int | None = None,
    batch_rows: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The harness's own result ({"results", "samples", "configs", ...}) of its tasks on this model.

    tasks: names that the harness knows, or of task files in `include_path`. limit: the first so many rows of each task.
    shots: solved rows before the question where the task leaves that open. options: of lm_eval.simple_evaluate.
    LookupError for a task that it does not know; ImportError, saying what to install, without the harness. Interrupted
    after should_stop.
    """
    lm_eval = _harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        place = f" and {str(include_path)!r} has no such task file" if include_path is not None else ""
        raise LookupError(f"task {unknown[0]!r} is unknown to lm-evaluation-harness{place}" if unknown else "no task")
    answering = harness_model(
        model, tokenizer, batch_tokens=batch_tokens, batch_rows=batch_rows, should_stop=should_stop
    )
    with evaluate.evaluation_mode(model):
        return lm_eval.simple_evaluate(
            answering, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, **options
        )


def harness_model(
    model: nn.Module,
    tokenizer: Any,
    *,
    batch_tokens: int | None = None,
    batch_rows: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Any:
    """The model, in evaluation mode, as an `lm_eval.api.model.LM`, for own calls of the harness."""
    return _answering()(model, tokenizer, batch_tokens, batch_rows, should_stop)


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(MISSING, name="lm_eval") from error
    return lm_eval


class _Answers:
    """Answers to the harness's three kinds of requests, in their order."""

    def __init__(self, model, tokenizer, batch_tokens, batch_rows, should_stop) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.batch_rows, self.should_stop = batch_tokens, batch_rows, should_stop
        self._device = next(model.parameters()).device

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.get_chat_template(None if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether the model would have written it) of each (context, continuation)."""
        asked: dict[str, dict[str, None]] = {}
        for request in requests:
            context, continuation = request.args
            asked.setdefault(context, {})[continuation] = None
        made = [scoring.question(self.tokenizer, context, list(choices)) for context, choices in asked.items()]
        pairs = [[(context, choice) for choice in choices] for context, choices in asked.items()]
        found: dict[tuple[str, str], tuple[float, bool]] = {}
        for number, values, greedy in self._judged(made):
            answers = zip(values, greedy, strict=True)
            for pair, answer in zip(pairs[number], answers, strict=True):
                found[pair] = answer
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return [found[request.args] for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, read in windows that do not overlap but for one token."""
        limit, made, of = scoring.longest_text(self.model), [], []
        for number, request in enumerate(requests):
            parts = scoring.text(self.tokenizer, request.args[0], limit)
            made += parts
            of += [number] * len(parts)
        sums = [0.0] * len(requests)
        for number, (value,), _ in self._judged(made):
            sums[of[number]] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes greedily after each (context, settings), up to the first of the settings' stops."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_writing(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        for (stops, count), numbers in groups.items():
            texts = generation.continuations(
                self.model,
                self.tokenizer,
                [requests[number].args[0] for number in numbers],
                stops=stops,
                max_new_tokens=count,
                batch_rows=self.batch_rows,
                should_stop=self.should_stop,
            )
            for at, text in texts:
                found[numbers[at]] = text
                self.cache_hook.add_partial("generate_until", requests[numbers[at]].args, text)
        return [found[number] for number in range(len(requests))]

    def _judged(self, made: list[scoring.Question]) -> Any:
        return scoring.judged(self.model, made, batch_tokens=self.batch_tokens, should_stop=self.should_stop)


@cache
def _answering() -> type:
    _harness()
    from lm_eval.api.model import LM

    return type("InMemory", (_Answers, LM), {})


def _writing(settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """(stop strings, most tokens) of a request. ValueError where not the likeliest is to be taken."""
    settings = dict(settings)
    counts = [settings.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    count = next((count for count in counts if count is not None), NEW_TOKENS)
    sampled = settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature"))
    other = sorted(name for name in settings if name not in (*GREEDY, *_IGNORED))
    if sampled or other:
        told = json.dumps(settings, default=str)
        raise ValueError(
            f"texts are written greedily here, the task asks for {told}; give gen_kwargs={{'do_sample': False}}, "
            "or use the harness's own hf model"
        )
    until = settings.get("until") or []
    return tuple([until] if isinstance(until, str) else until), int(count)
