"""What does one model of a comparison answer, before or after tuning? Asked, or taken from before without any weights.

Answers are kept (kept_answers.py) by an identity that is known before weights are read; a tuned model's holds its
training. Measures are computed anew from the answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbhelpers import answer_cache, facts, kept_answers, label_answers, memory, models, records, runtime, training
from nbhelpers.comparison_config import ComparisonConfig, ModelInstanceConfig
from nbhelpers.dialogues import Dialogue
from nbhelpers.kept_answers import Answers
from nbhelpers.prompts import Prompts
from nbhelpers.tracking import ExperimentTracker, Interrupted

FORMAT = 2  # of the code that makes these answers
PARTIAL = "predictions.partial.jsonl"  # archives leave predictions out
TRAINING = "training.json"  # of a tuning that is finished
UNCHECKED = "predictions.unchecked.safetensors"  # logits of a tuned model until what was saved is compared with them
OWN = "answers.sha256"  # names the kept answers that this run has asked for itself
VALIDATION_ROWS = 64  # dialogues that choose the best state of a tuning
CHECKED_ROWS = 64  # training rows of which is checked that they are asked as they are taught
WARM_UP = 4  # dialogues that are asked before the clock starts, whose answers are dropped


@dataclass(frozen=True)
class Tuning:
    """What a model is tuned on, and how."""

    train: Sequence[Dialogue]
    validation: Sequence[Dialogue]
    config: training.TrainingConfig
    keep: bool = True  # the tuned model


@dataclass(frozen=True)
class Asking:
    """One state of a model and what it is asked: `parts` of the data, each answered in these `kinds`."""

    key: str
    model: ModelInstanceConfig
    prompts: Prompts
    parts: Mapping[str, Sequence[Dialogue]]
    kinds: Sequence[str]
    tuning: Tuning | None = None
    latency: int = 0  # requests that are timed one at a time


def identity(asking: Asking, config: ComparisonConfig) -> dict[str, Any] | None:
    """Everything that decides the answers; None where a hub model's revision is not known."""
    name, device = asking.model.name, config.device or runtime.device()
    files = models.revision(name)
    if files is None:
        return None
    tuning = asking.tuning
    versions = runtime.library_versions()
    return {
        "format": FORMAT,
        "model": files,
        "tokenizer": models.tokenizer_fingerprint(asking.prompts.tokenizer),
        "prompts": asking.prompts.record(),
        "parts": {name: _digest(rows) for name, rows in asking.parts.items()},
        "kinds": list(asking.kinds),
        "new_tokens": asking.prompts.new_tokens,
        "device": runtime.device_name(device),  # times and memory are kept too: they are of this device
        "dtype": str(models.DTYPES[asking.model.dtype] or runtime.dtype_for(device)),
        "quantization": asking.model.quantization,
        "tuning": None if tuning is None else _tuning_identity(tuning),
        "libraries": {name: versions.get(name) for name in answer_cache.LIBRARIES},
    }


def _tuning_identity(tuning: Tuning) -> list[Any]:
    several = any(len(row.labels) > 1 for row in tuning.validation[:VALIDATION_ROWS])
    found = [tuning.config.model_dump(), _digest(tuning.train), _digest(tuning.validation)]
    return [*found, "validated on every label"] if several else found  # once it was on the first one


def _digest(rows: Sequence[Dialogue]) -> str:
    return records.sha256_json([[row.id, row.text, list(row.labels)] for row in rows])


def obtain(
    asking: Asking,
    config: ComparisonConfig,
    tracker: ExperimentTracker,
    tell: Callable[[dict], None],
    should_stop: Callable[[], bool] | None = None,
) -> Answers:
    """The answers of one model state: from before where nothing differs, else the model is loaded (and tuned) now.

    What an earlier attempt of this run has asked serves however old it is, also where answers of other runs do not.
    """
    known = identity(asking, config)
    kept = kept_answers.folder(tracker.run_dir)
    place = None if known is None else kept / f"{kept_answers.PREFIX}{records.sha256_json(known)}"
    mark = tracker.run_dir / "models" / asking.key / OWN
    own = place is not None and mark.is_file() and mark.read_text() == place.name
    serves = place is not None and (config.cache or own)
    found = kept_answers.read(place, None if own else config.cache_days) if serves else None
    if found is not None and (gone := _lost_model(asking, found)):
        tracker.event(
            "answers", key=asking.key, came="asked again", why=f"the tuned model {gone!r} is not there any more"
        )
        found = None
    if found is None:
        found = _ask(asking, config, tracker, tell, should_stop)
        if place is not None and all(fact["ok"] for fact in found.about["facts"]):
            kept_answers.write(place, found)
            mark.parent.mkdir(parents=True, exist_ok=True)
            records.write_atomic(mark, place.name)
    other = _other_latency(asking, found)
    tracker.event("answers", key=asking.key, came=found.came, **({"latency": other} if other else {}))
    if other:
        tell({"stage": "from before", "key": asking.key, "says": other})
    return found


def _other_latency(asking: Asking, found: Answers) -> str | None:
    """What is to be said where kept answers come with another number of timed requests than was asked for.

    That number is in no identity: answers are not asked again for it.
    """
    timed = (found.about["performance"].get("latency") or {}).get("n", 0)
    if found.came != "cached" or not asking.latency or timed == min(asking.latency, len(asking.parts["test"])):
        return None
    return f"latency of {timed or 'no'} requests is from the run that asked (you asked for {asking.latency})"


def _lost_model(asking: Asking, found: Answers) -> str | None:
    """The folder of the tuned model that these answers are of, where it is gone: whoever tunes wants the model too."""
    folder = found.about["model_dir"] if asking.tuning is not None and asking.tuning.keep else None
    return None if folder is None or Path(folder).is_dir() else folder


def _ask(asking: Asking, config: ComparisonConfig, tracker: ExperimentTracker, tell, should_stop) -> Answers:
    folder = tracker.run_dir / "models" / asking.key
    folder.mkdir(parents=True, exist_ok=True)
    tuned = _finished_tuning(folder) if asking.tuning is not None else None
    source = str(folder / "model") if tuned is not None else asking.model.name
    quantization = None if tuned is not None else asking.model.quantization
    dtype = asking.model.dtype
    if asking.tuning is not None and asking.tuning.config.method == "full" and dtype == "auto":
        dtype = "float32"  # masters of the weights that are trained
    device = config.device or runtime.device()
    if tuned is not None:
        _check_saved(asking, folder, tuned, device)  # before another copy is loaded

    def load() -> models.LoadedModel:
        tell({"stage": "loading", "key": asking.key})
        return models.load_model(source, device=config.device, dtype=dtype, quantization=quantization)

    with ExitStack() as held:
        with memory.peak() as preparing:  # loading and tuning; the checks of both are not what a user needs
            model = held.enter_context(memory.loaded(load)).model
            if asking.tuning is not None and tuned is None:
                for name in (PARTIAL, TRAINING):  # of weights that a kill or somebody took along
                    (folder / name).unlink(missing_ok=True)
                tuned = _tune(asking, model, folder, tell, should_stop)
                if cut := tuned["record"]["truncated"]:
                    tracker.event("training_prompts_cut", key=asking.key, cut=cut, dialogues=len(asking.tuning.train))
        if tuned is not None and not (folder / TRAINING).exists():
            tuned["memory"] = _peak(preparing, preparing)
            if asking.tuning.keep:
                _save(asking, model, folder, tuned)
                _check_saved(asking, folder, tuned, device)
        with memory.peak() as answering:
            answers = _answer(asking, config, model, folder, tell, should_stop)
            performance = answers.about["performance"] | {"came": "measured", "device": runtime.device_name(device)}
            if asking.latency:
                kind = "writing" if "writing" in asking.kinds else "ranking"
                some = list(asking.parts["test"])[: asking.latency]
                performance["latency"] = label_answers.latency(
                    model, asking.prompts, some, kind, should_stop=should_stop
                )
        checked = [label_answers.labels_score_as_alone(model, asking.prompts, asking.parts["test"]).as_dict()]
        about = {
            "parameters": models.parameters(model),
            "precision": precision(model),
            "training": None if tuned is None else tuned["record"],
            "facts": [*(tuned["facts"] if tuned is not None else ()), *checked],
            "model_dir": str((folder / "model").resolve()) if tuned is not None and asking.tuning.keep else None,
            "performance": performance,
            "memory": {"weights_bytes": models.weight_bytes(model)} | _most(_peak(preparing, answering), tuned),
            "truncated": answers.about["truncated"],
        }
    (folder / PARTIAL).unlink(missing_ok=True)
    return Answers(answers.lines, answers.scores, about)


def _peak(first: memory.MemoryMark, second: memory.MemoryMark) -> dict[str, Any]:
    """The most that loading, tuning and answering held: allocated on CUDA, else what the process grew by."""
    if cuda := max(first.cuda_peak, second.cuda_peak):
        return {"peak_bytes": cuda, "kind": "cuda"}
    grown = max(first.resident_peak, second.resident_peak) - first.resident_before
    return {"peak_bytes": grown, "kind": "resident"}


def _most(now: dict[str, Any], tuned: Mapping[str, Any] | None) -> dict[str, Any]:
    """What this attempt held, or the one that tuned the model where that is more; None bytes where it did not say."""
    if tuned is None:
        return now
    if "memory" not in tuned:
        return now | {"peak_bytes": None}
    same = [one for one in (now, tuned["memory"]) if one["kind"] == now["kind"]]
    return max(same, key=lambda one: one["peak_bytes"])


def precision(model: Any) -> str:
    """Number format of the weights and of the arithmetic: "float32", "4bit nf4, compute bfloat16"."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    dtype = str(parameter.dtype).removeprefix("torch.")
    if getattr(model, "is_loaded_in_4bit", False):
        return f"4bit nf4, others {dtype}"
    return f"8bit, others {dtype}" if getattr(model, "is_loaded_in_8bit", False) else dtype


def _answer(asking: Asking, config: ComparisonConfig, model, folder: Path, tell, should_stop) -> Answers:
    """Every part in every kind; what an earlier attempt of this run has answered is taken over."""
    partial = folder / PARTIAL
    before: dict[tuple[str, int], dict] = {}
    spent: dict[tuple[str, str], float | None] = {}  # seconds of a part in a kind; None = a line does not say
    for line in records.read_lines(partial)[0]:
        before.setdefault((line["part"], line["number"]), {}).update(records.restore(line["answer"]))
        place = line["part"], "ranking" if "ranked" in line["answer"] else "writing"
        spent[place] = None if spent.get(place, 0.0) is None else line.get("seconds")
    lines: dict[str, list[dict]] = {}
    scores: dict[str, np.ndarray | None] = {}
    speeds: dict[str, dict] = {}
    total = sum(len(rows) for rows in asking.parts.values()) * len(asking.kinds)
    truncated: dict[str, int] = {}
    done = 0
    for part, rows in asking.parts.items():
        asked_with = [asking.prompts.prompt(row.text) for row in rows]
        truncated[part] = sum(prompt.cut > 0 for prompt in asked_with)
        found = [{"id": row.id, "gold": list(row.labels), **before.get((part, at), {})} for at, row in enumerate(rows)]
        for kind in asking.kinds:
            mark = "ranked" if kind == "ranking" else "said"
            left = [at for at, line in enumerate(found) if mark not in line]
            done += len(rows) - len(left)
            asked = [rows[at] for at in left]
            options = {"kinds": (kind,), "batch_tokens": config.batch_tokens}
            if part == "test":  # it is timed: what is slow but once comes before
                for _ in label_answers.answered(
                    model, asking.prompts, asked[:WARM_UP], **options, should_stop=should_stop
                ):
                    pass
            tokens, earlier = [len(prompt.ids) for prompt in asked_with], spent.get((part, kind), 0.0)
            clock = label_answers.Clock(kind, [tokens[at] for at in left], should_stop)
            answers = label_answers.answered(model, asking.prompts, asked, **options, should_stop=clock.should_stop)
            for number, more in clock.running(answers):
                at, done = left[number], done + 1
                found[at] |= more
                plain = more | ({"logprobs": more["logprobs"].tolist()} if "logprobs" in more else {})
                seconds = None if earlier is None else earlier + clock.seconds
                answer = {"part": part, "number": at, "answer": records.plain(plain), "seconds": seconds}
                records.append_line(partial, answer)
                tell(
                    {"stage": "answering", "key": asking.key, "part": part, "line": found[at], "number": at}
                    | {"done": done, "total": total}
                )
            if part == "test" and earlier is not None:
                whole = label_answers.Speed(earlier + clock.seconds, len(rows), sum(tokens))
                speeds[kind] = (clock.speed() if len(left) == len(rows) else whole).record()
        columns = [line.pop("logprobs", None) for line in found]
        scores[part] = None if columns[0] is None else np.asarray(columns, dtype=np.float32)
        lines[part] = found
    return Answers(lines, scores, {"performance": {"kinds": speeds}, "truncated": truncated})


def _finished_tuning(folder: Path) -> dict[str, Any] | None:
    """{record, facts} of a tuning that an earlier attempt of this run has finished, its model whole beside it."""
    record = folder / TRAINING
    return records.read_json(record) if record.is_file() and (folder / "model").is_dir() else None


def _tune(asking: Asking, model, folder: Path, tell, should_stop) -> dict[str, Any]:
    """Tune `model` in place: {record, facts}."""
    tuning, prompts = asking.tuning, asking.prompts
    pairs = [(row, label) for row in tuning.train for label in row.labels]
    taught = [prompts.row(row.text, label) for row, label in pairs]
    checked = [label_answers.trained_as_asked(prompts, [row for row, _ in pairs[:CHECKED_ROWS]], taught[:CHECKED_ROWS])]
    held = [prompts.row(row.text, label) for row in tuning.validation[:VALIDATION_ROWS] for label in row.labels]
    result = training.fine_tune(
        model,
        taught,
        held,
        tuning.config,
        output_dir=folder / "checkpoints",
        progress=lambda now: tell({"stage": "tuning", "key": asking.key, "steps": tuning.config.steps} | now),
        should_stop=should_stop,
        resume=True,
    )
    if result.status == "stopped":
        raise Interrupted(f"stopped in step {result.steps} of {tuning.config.steps} of tuning {asking.key}")
    checked += [facts.loss_is_the_models_own(result.loss_check, result.packing)]
    checked += [facts.loss_leaves_out_the_prompt(result.labels)]
    if not tuning.keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    method = tuning.config.method
    record = {
        "method": method,
        "steps": result.steps,
        "epochs": tuning.config.steps * tuning.config.batch_size / len(taught),
        "rows": len(taught),
        "truncated": sum(prompts.prompt(row.text).cut > 0 for row in tuning.train),  # dialogues
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "lora_rank": None if method == "full" else tuning.config.lora_rank,
        "lora_alpha": None if method == "full" else tuning.config.lora_alpha,
        "learning_rate": result.learning_rate,
        "precision": result.precision,
        "train_losses": [list(pair) for pair in result.train_losses],
        "validation_nlls": [list(pair) for pair in result.validation_nlls],
        "best_step": result.best_step,
        "skipped_steps": result.skipped_steps,
        "merge_difference": result.merge_difference,
    }
    return {"record": record, "facts": [fact.as_dict() for fact in checked]}


def _save(asking: Asking, model, folder: Path, tuned: dict[str, Any]) -> None:
    """Save the tuned model with its prompts, and what it computes."""
    from safetensors.torch import save

    place, prompts = folder / "model", asking.prompts
    shutil.rmtree(place, ignore_errors=True)
    records.write_atomic(folder / UNCHECKED, save({"logits": facts.logits(model, [_checked_row(asking)])}))
    models.save_model(model, prompts.tokenizer, place)
    prompts.save(place)
    tuned["allowed"] = facts.tolerance(model)
    records.write_json(folder / TRAINING, records.plain(tuned))  # from here on a kill loses no tuning
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _checked_row(asking: Asking) -> dict[str, Any]:
    first = asking.tuning.train[0]
    return asking.prompts.row(first.text, first.labels[0])


def _check_saved(asking: Asking, folder: Path, tuned: dict[str, Any], device: str) -> None:
    """See whether what was saved computes the same, unless that was seen: an attempt may have died over it."""
    from safetensors.torch import load_file

    name, says = "saved_model_is_the_same", "what was saved computes the same"
    if any(fact["name"] == name for fact in tuned["facts"]):
        return
    if (folder / UNCHECKED).is_file():
        row, before = _checked_row(asking), load_file(folder / UNCHECKED)["logits"]
        fact = facts.saved_logits_are_the_same(name, says, folder / "model", row, before, device, tuned["allowed"])
    else:
        fact = facts.Fact(name, False, says, "it was not checked when it was saved: tune it in a new run")
    tuned["facts"].append(fact.as_dict())
    records.write_json(folder / TRAINING, records.plain(tuned))
    (folder / UNCHECKED).unlink(missing_ok=True)
