"""How well does a model do a task, document by document? The harness's protocols on a model in memory, or one run.

`evaluate` takes a model as it is: pruned, gated, quantised, with adapters. `EvaluationExperiment.run` loads one, keeps
each answer as it is given, goes on after a kill, and takes answers from before where nothing that decides them differs.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from nbhelpers import (
    answer_cache,
    answers,
    facts,
    generation,
    mask_choice,
    mask_sets,
    masks,
    memory,
    models,
    predictions,
    records,
    runtime,
    scoring,
    stats,
    tasks,
)
from nbhelpers.evaluate import evaluation_mode
from nbhelpers.strict import StrictConfig
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker, Interrupted

PARTIAL = "predictions.partial.jsonl"  # answers in the order in which they are given, until all are there
CHECKED = 2  # documents that are scored a second time, each choice alone


class EvaluationConfig(StrictConfig):
    """Everything that decides an evaluation. Refuses nonsense and unknown names before anything is loaded."""

    name: str = Field("evaluation", min_length=1, description="what the run is called in its record")
    model: str = Field("tiny-llama", description="bundled name, local folder, run directory or hub id")
    task: str = Field("boolq", description=f"one of {', '.join(sorted(tasks.TASKS))}")
    data: str | None = Field(
        None, description="bundled, or a csv, json, jsonl or parquet file; None = the task's rows on the hub"
    )
    shots_data: str | None = Field(None, description="rows that shots are drawn from; None = the task's training rows")
    shots: int | None = Field(
        None, ge=0, le=100, description="solved rows before each question; None = as the task says"
    )
    limit: int | None = Field(None, ge=1, description="the first so many rows, in order; None = all")
    lenient: bool = Field(False, description="leave out rows that cannot be used, and list them")
    adapter: str | None = Field(None, description="folder of adapters (PEFT) to put on the model; None = none")
    masks: str | None = Field(
        None, description="mask file, or the folder of masks create, to apply before anything is asked; None = none"
    )
    masks_sparsity: float | None = Field(None, ge=0, le=1, description="which of its sparsities; None = the only one")
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="weights in 8 or 4 bits; None = as they are")
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of weights"
    )
    device: str | None = Field(None, description="cpu, cuda or mps; None = what is found")
    batch_tokens: int | None = Field(None, ge=1, description="most padded tokens of a pass; None = by device")
    cache: bool = Field(True, description="take answers from before where nothing that decides them differs")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> EvaluationConfig:
        if self.masks is None and self.masks_sparsity is not None:
            raise ValueError(f"masks_sparsity is one of a mask file's: name the file, got {self.masks_sparsity} alone")
        if self.masks is not None and self.quantization is not None:
            raise ValueError(
                f"masks go onto whole weights, got quantization {self.quantization!r} too: mask the model first "
                "(nbhelpers masks apply), then quantise what that wrote"
            )
        return self


def evaluate(
    model: nn.Module,
    tokenizer,
    task: str,
    data: str | Path | None = None,
    *,
    shots: int | None = None,
    shots_data: str | Path | None = None,
    limit: int | None = None,
    lenient: bool = False,
    batch_tokens: int | None = None,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Evaluate a model in memory: {task, protocol, n, acc, acc_stderr, ..., predictions: [a dict a document]}.

    data, shots, limit: see EvaluationConfig. The model is put into evaluation mode and back.
    """
    rows, asked = questions(task, data, shots=shots, shots_data=shots_data, limit=limit, lenient=lenient)
    lines: list[dict | None] = [None] * len(asked)
    for number, line in answered(
        model, tokenizer, rows.task, asked, batch_tokens=batch_tokens, should_stop=should_stop
    ):
        lines[number] = line
        if progress is not None:
            progress({"stage": "answering", "done": sum(line is not None for line in lines), "total": len(asked)})
    protocol = tasks.protocol(rows, shots) | precision_of(model)
    return {
        "task": task,
        "protocol": protocol,
        **measures(lines, rows.task.metrics),
        "problems": list(rows.problems),
        "predictions": lines,
    }


def questions(task: str, data, *, shots, shots_data, limit, lenient=False) -> tuple[tasks.Rows, list[tasks.Asked]]:
    """(rows, what is asked about each): all that can be wrong with task and data is said here, before any weights."""
    rows = tasks.read(task, data, limit=limit, lenient=lenient)
    wanted = rows.task.shots if shots is None else shots
    pool = None
    if wanted and (shots_data is not None or data is None or str(data) == tasks.BUNDLED):
        pool = tasks.read(task, data if shots_data is None else shots_data, "train", lenient=lenient)
        asked = {rows.task.prompt(row.fields) for row in rows.rows}
        both = sum(rows.task.prompt(row.fields) in asked for row in pool.rows)
        if both:
            raise ValueError(
                f"{both} rows of {pool.source!r} are asked too, so their solutions would stand among the shots; give "
                "other --shots-data, or --shots 0"
            )
    return rows, tasks.documents(rows, shots=shots, shots_rows=pool, limit=limit)


def precision_of(model: nn.Module) -> dict[str, Any]:
    """What of the model a protocol names: number format of its weights and of their arithmetic."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    bits = {True: "4bit"}.get(getattr(model, "is_loaded_in_4bit", False))
    bits = bits or {True: "8bit"}.get(getattr(model, "is_loaded_in_8bit", False))
    return {"dtype": str(parameter.dtype).removeprefix("torch."), "quantization": bits}


# Answers --------------------------------------------------------------------------------------------------------------


def answered(
    model: nn.Module,
    tokenizer,
    task: tasks.Task,
    asked: Sequence[tasks.Asked],
    *,
    batch_tokens: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, line of predictions.jsonl) of each document as it is answered; not in order."""
    with evaluation_mode(model):
        if task.kind == "choices":
            made = [_question(tokenizer, document) for document in asked]
            for number, values in scoring.loglikelihoods(
                model, made, batch_tokens=batch_tokens, should_stop=should_stop
            ):
                yield number, choice_line(asked[number], values)
            return
        if task.kind == "rolling":
            yield from _read_texts(model, tokenizer, asked, batch_tokens, should_stop)
            return
        prompts = [document.context for document in asked]
        for number, text in generation.continuations(
            model, tokenizer, prompts, stops=task.stops, max_new_tokens=task.new_tokens, should_stop=should_stop
        ):
            yield number, text_line(asked[number], text)


def _read_texts(model: nn.Module, tokenizer, asked: Sequence[tasks.Asked], batch_tokens, should_stop):
    """(number, line) of each text when its last window has been read."""
    limit, made, of = scoring.longest_text(model), [], []
    for number, document in enumerate(asked):
        parts = scoring.text(tokenizer, document.context, limit)
        if not parts:
            raise ValueError(
                f"row {document.id!r}: its text {document.context[:30]!r} has no tokens, so nothing is scored"
            )
        made += parts
        of += [number] * len(parts)
    found: list[list[float]] = [[] for _ in asked]
    windows = Counter(of)
    tokens = Counter()
    for part, number in zip(made, of, strict=True):
        tokens[number] += len(part.choices[0])
    for part, (value,) in scoring.loglikelihoods(model, made, batch_tokens=batch_tokens, should_stop=should_stop):
        number = of[part]
        found[number].append(value)
        if len(found[number]) == windows[number]:
            yield number, rolling_line(asked[number], math.fsum(found[number]), tokens[number])


def _question(tokenizer, document: tasks.Asked) -> scoring.Question:
    try:
        return scoring.question(tokenizer, document.context, document.choices)
    except ValueError as error:
        raise ValueError(f"row {document.id!r}: {error}") from error


def choice_line(document: tasks.Asked, values: Sequence[float]) -> dict[str, Any]:
    """A document with its log-likelihoods (nats, one a choice) and the best choice, the first one where they are equal.

    Where one is not a number nothing is chosen: prediction and prediction_norm are None.
    """
    known = all(map(math.isfinite, values))
    normed = [value / length for value, length in zip(values, document.lengths, strict=True)] if known else values
    return {
        "id": document.id,
        "gold": document.gold,
        "loglikelihoods": list(values),
        "prediction": values.index(max(values)) if known else None,
        "prediction_norm": normed.index(max(normed)) if known else None,
    }


def text_line(document: tasks.Asked, text: str) -> dict[str, Any]:
    """A document with the text written for it, and whether each reading of it is right."""
    graded = answers.grade(text, document.gold)
    return {
        "id": document.id,
        "gold": document.gold,
        "text": text,
        "strict": graded.strict_match,
        "flexible": graded.flexible_match,
        "strict_answer": graded.strict,
        "flexible_answer": graded.flexible,
    }


def rolling_line(document: tasks.Asked, value: float, tokens: int) -> dict[str, Any]:
    """A text with its log-likelihood (nats), and of how many tokens, bytes (UTF-8) and words it is one."""
    text = document.context
    return {
        "id": document.id,
        "loglikelihood": value,
        "tokens": tokens,
        "bytes": len(text.encode("utf-8")),
        "words": len(re.split(r"\s+", text)),  # as the harness counts them
    }


def measures(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """{n, invalid, and of each measure named: name, name_stderr, name_interval (bootstrap over documents)}.

    An answer that is not valid (a log-likelihood that is not a number) counts as wrong and in `invalid`; texts of which
    one has none have no perplexity: FloatingPointError.
    """
    found: dict[str, Any] = {"n": len(lines)}
    if any(name in predictions.RATIOS for name in names):
        return found | _perplexities(lines, names)
    by_measure = predictions.outcomes(lines)
    found["invalid"] = sum("prediction" in line and line["prediction"] is None for line in lines)
    if found["invalid"] == len(lines):
        raise FloatingPointError(
            f"all {len(lines)} documents have log-likelihoods that are no numbers; try dtype float32"
        )
    for name in names:
        right = [float(bool(value)) for value in by_measure[name]]
        interval = stats.bootstrap(right)
        found[name] = stats.mean(right)
        found[f"{name}_stderr"] = stats.standard_error(right)
        found[f"{name}_interval"] = {"low": interval.low, "high": interval.high, "over": interval.over}
    return found


def _perplexities(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    unknown = [line["id"] for line in lines if not math.isfinite(line["loglikelihood"])]
    if unknown:
        raise FloatingPointError(
            f"{len(unknown)} of {len(lines)} texts, the first with id {unknown[0]!r}, have log-likelihoods that are no "
            "numbers, so there is no perplexity; try dtype float32"
        )
    found: dict[str, Any] = {"invalid": 0}
    for name in names:
        unit = predictions.RATIOS[name]
        interval = stats.bootstrap(predictions.nats_and_units(lines, unit), predictions.exp_of_ratio)
        found[unit] = sum(line[unit] for line in lines)
        found[name] = interval.mean
        found[f"{name}_interval"] = {"low": interval.low, "high": interval.high, "over": interval.over}
    return found


# A run ----------------------------------------------------------------------------------------------------------------


class EvaluationExperiment:
    """`EvaluationExperiment.run(config)` does the whole job and returns what result.json holds."""

    @staticmethod
    def run(
        config: EvaluationConfig,
        *,
        root: str | Path = "runs",
        run_dir: str | Path | None = None,
        resume: bool = False,
        command: list[str] | None = None,
        progress: Callable[[dict], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Run `config` and leave a run directory with predictions.jsonl; returns its result.

        resume: go on in `run_dir` with the documents that have no answer yet. Raises LookupError or ValueError for what
        cannot be run, before a run directory exists; tracking.Interrupted after should_stop.
        """
        runtime.check_supported()
        models.load_config(config.model)
        if config.adapter is not None:
            models.check_adapters(config.adapter)
        if config.masks is not None:
            mask_choice.level_in(config.masks, config.masks_sparsity, "--masks-sparsity")
        rows, asked = questions(
            config.task,
            config.data,
            shots=config.shots,
            shots_data=config.shots_data,
            limit=config.limit,
            lenient=config.lenient,
        )
        identity = _identity(config, rows, asked)
        record = ExperimentConfig(kind="evaluation", **config.model_dump())
        with ExperimentTracker(record, root, run_dir=run_dir, resume=resume, command=command) as tracker:
            tracker.set_fingerprints(documents=identity["documents"], answers=records.sha256_json(identity))
            result = _run(config, tracker, rows, asked, identity, progress, should_stop)
            tracker.finish(result)
        return result


def _identity(config: EvaluationConfig, rows: tasks.Rows, asked: Sequence[tasks.Asked]) -> dict[str, Any]:
    masks_sha256 = None if config.masks is None else records.sha256_known(mask_choice.file_in(config.masks))
    return answer_cache.identity(
        config.model,
        rows,
        asked,
        device=config.device,
        adapter=None if config.adapter is None else models.files_fingerprint(config.adapter),
        masks=None if masks_sha256 is None else [masks_sha256, config.masks_sparsity],
        dtype=config.dtype,
        quantization=config.quantization,
    )


def _run(config, tracker: ExperimentTracker, rows, asked, identity, progress, should_stop) -> dict[str, Any]:
    tell = progress or (lambda now: None)
    folder = tracker.run_dir
    known = identity["model"] is not None and (config.adapter is None or identity["adapter"] is not None)
    cached = answer_cache.place(folder, identity) if config.cache and known else None
    before, used, speed = answer_cache.read(cached, asked), None, None
    if before is None:
        lines, checked, precision, used, speed = _answer(config, tracker, rows, asked, tell, should_stop)
        checked = [fact.as_dict() for fact in checked]
        answer_cache.write(cached, lines, checked, precision)
    else:
        lines, checked, precision = before["lines"], before["facts"], before["precision"]
    came = "measured" if before is None else "cached"
    tracker.event("answers", came=came, documents=len(lines))
    records.write_atomic(folder / predictions.FILE, predictions.as_lines(lines))
    (folder / PARTIAL).unlink(missing_ok=True)
    found = measures(lines, rows.task.metrics)
    protocol = tasks.protocol(rows, config.shots) | precision
    return {
        "kind": "evaluation",
        "model": config.model,
        "task": config.task,
        "protocol": protocol | {"came": came, "device": identity["device"]},
        **found,
        "problems": [problem.split(", got ")[0] for problem in rows.problems],  # places and rules, no text of users
        "documents_per_second": speed,
        "memory": used,
        "facts": checked,
        "all_facts_hold": all(fact["ok"] for fact in checked),
        "verdict": verdict(config, rows, found),
        "run_dir": str(folder),
    }


def _answer(config, tracker: ExperimentTracker, rows, asked, tell, should_stop):
    """(lines in order, facts, precision, memory, documents a second), answers of an earlier attempt taken over."""
    folder, lines = tracker.run_dir, [None] * len(asked)
    tell({"stage": "loading", "model": config.model})
    with memory.peak() as used:
        loaded = models.load_model(
            config.model, device=config.device, dtype=config.dtype, quantization=config.quantization
        )
        if config.masks is not None:  # before adapters: a mask is one of the model's own weights
            file = mask_sets.load_for(mask_choice.file_in(config.masks), config.model, loaded.model)
            chosen = file.levels.lazily(config.masks_sparsity)
            masks.apply(loaded.model, chosen)
        if config.adapter is not None:
            models.put_adapters(loaded.model, config.adapter)
        if models.locate(config.model)[0] == "hub":  # else the files were compared before
            tracker.set_fingerprints(model=models.fingerprint(loaded.model))
        for line in records.read_lines(folder / PARTIAL)[0] if (folder / PARTIAL).exists() else []:
            lines[line["number"]] = records.restore(line["answer"])
        left = [number for number, line in enumerate(lines) if line is None]
        checked, precision = _facts(loaded, rows.task, asked), precision_of(loaded.model)
        if config.masks is not None and config.adapter is None:
            checked.append(facts.mask_holds(loaded.model, chosen))
        started, before = time.perf_counter(), len(asked) - len(left)
        try:
            for number, line in answered(
                loaded.model,
                loaded.tokenizer,
                rows.task,
                [asked[number] for number in left],
                batch_tokens=config.batch_tokens,
                should_stop=should_stop,
            ):
                lines[left[number]] = line
                records.append_line(folder / PARTIAL, {"number": left[number], "answer": records.plain(line)})
                before += 1
                tell({"stage": "answering", "done": before, "total": len(asked)})
        except Interrupted as error:
            raise Interrupted(f"stopped after {before} of {len(asked)} documents; --resume goes on") from error
        seconds = time.perf_counter() - started
        memory.release(loaded.model)
    taken = {"resident_grown_bytes": used.resident_grown, "cuda_peak_bytes": used.cuda_peak}
    return lines, checked, precision, taken, len(left) / seconds if left else 0.0


def _facts(loaded: models.LoadedModel, task: tasks.Task, asked: Sequence[tasks.Asked]) -> list[facts.Fact]:
    if task.kind == "text":
        return []
    if task.kind == "rolling":
        limit = scoring.longest_text(loaded.model)
        first = [scoring.text(loaded.tokenizer, document.context, limit)[0] for document in asked[:CHECKED]]
        return [facts.texts_score_as_the_model_reads_them(loaded.model, first)]
    few = [_question(loaded.tokenizer, document) for document in asked[:CHECKED]]
    return [facts.choices_score_as_alone(loaded.model, few)]


def verdict(config: EvaluationConfig, rows: tasks.Rows, found: Mapping[str, Any]) -> str:
    """One sentence with the first measure, its interval, and on what it was measured."""
    name = rows.task.metrics[0]
    interval = found[f"{name}_interval"]
    made = " (rows that this project generated)" if rows.generated else ""
    between = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    return (
        f"{config.model} on {config.task}: {name} {found[name]:.3f}{between} "
        f"(95 % over {found['n']} documents), {rows.source}{made}."
    )
