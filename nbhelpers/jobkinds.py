"""Which kinds of jobs can stand in a plan? Each is registered here; what is heavy is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbhelpers.grid import KINDS, JobKind
from nbhelpers.records import sha256_json, sha256_known

STAGES = ("baseline", "pruned", "fine_tuned", "control")


@KINDS.register("pruning")
def pruning() -> JobKind:
    """Baseline, heads closed, fine-tuned, beside a control: experiments.PruningExperiment."""
    from nbhelpers.experiments import PruningConfig, PruningExperiment

    return JobKind(
        config=PruningConfig,
        run=PruningExperiment.run,
        resolve=_resolved_pruning,
        fingerprint=lambda config: {"model": _model_files(config.model), "text": _text_file(config.text)},
        similar=lambda config: [config[name] for name in ("model", "strategy", "iterative", "steps", "control")],
        estimate=_pruning_seconds,
        columns=pruning_columns,
        reads=lambda config: _corpus_read(config.text),
        heard=_heard_validation,
        seen=_seen_validations,
    )


@KINDS.register("fine_tuning")
def fine_tuning() -> JobKind:
    """Baseline, fine-tuned, saved: fine_tuning.FineTuningExperiment. A job that was killed or stopped goes on from its
    newest checkpoint, in the same run directory."""
    from nbhelpers.fine_tuning import FineTuningConfig, FineTuningExperiment

    return JobKind(
        config=FineTuningConfig,
        run=FineTuningExperiment.run,
        resolve=_resolved_fine_tuning,
        fingerprint=lambda config: {
            "model": _model_files(config.model),
            "control": config.control and _model_files(config.control),
            "data": _text_file(config.data),
            **({"masks": _mask_files(config.masks)} if config.masks else {}),
        },
        similar=lambda config: [config[name] for name in COSTS],
        estimate=_fine_tuning_seconds,
        columns=fine_tuning_columns,
        reads=lambda config: _corpus_read(config.data),
        resumes=True,
        heard=_heard_validation,
        seen=_seen_validations,
    )


@KINDS.register("evaluation")
def evaluation() -> JobKind:
    """One model on one task: evaluation.EvaluationExperiment. A job that was killed goes on with the documents that
    have no answer yet."""
    from nbhelpers.evaluation import EvaluationConfig, EvaluationExperiment

    return JobKind(
        config=EvaluationConfig,
        run=EvaluationExperiment.run,
        resolve=lambda config: config.model_dump(exclude={"name", "batch_tokens", "cache"}),
        fingerprint=lambda config: {
            "model": _model_files(config.model),
            "adapter": config.adapter and _model_files(config.adapter),
            "data": config.data and _text_file(config.data),
            "shots_data": config.shots_data and _text_file(config.shots_data),
            "masks": config.masks and _mask_files(config.masks),
        },
        similar=lambda config: [config[name] for name in ("model", "task", "data", "shots", "limit", "quantization")],
        columns=evaluation_columns,
        reads=_evaluation_reads,
        resumes=True,
    )


def evaluation_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one evaluation: its task's measures, of how many documents, and how sure."""
    measures = [name.removesuffix("_interval") for name in result if name.endswith("_interval")]
    found = {name: result.get(name) for name in ("n", "invalid", "all_facts_hold", "documents_per_second")}
    for name in measures:
        interval = result[f"{name}_interval"]
        found |= {name: result[name], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
    return found


@KINDS.register("sparsity")
def sparsity() -> JobKind:
    """Mask, LoRA, merge, evaluation: sparsity.SparsityExperiment. A job that was killed is masked again, alike, and
    goes on from its newest checkpoint."""
    from nbhelpers import mask_sets, shared_models, sparsity_price
    from nbhelpers.sparsity import SparsityConfig, SparsityExperiment

    def run(config, run_dir=None, **how) -> dict[str, Any]:
        return SparsityExperiment.run(config, run_dir=run_dir, sparsities=_asked_together(config, run_dir), **how)

    def close() -> None:
        shared_models.release()
        mask_sets.release()

    return JobKind(
        config=SparsityConfig,
        run=run,
        resolve=_resolved_sparsity,
        fingerprint=lambda config: {
            "model": _model_files(config.model),
            "data": config.data and _text_file(config.data),
            "train_data": config.train_data and _text_file(config.train_data),
        },
        similar=lambda config: [config[name] for name in ("model", "task", "steps", "batch_size", "tuning")],
        columns=sparsity_columns,
        resumes=True,
        estimate=_sparsity_seconds,
        early=lambda config: EARLY.get(config["sparsity"], len(EARLY)),
        shares=lambda config: config["model"],
        price=sparsity_price.price,
        reads=_sparsity_reads,
        close=close,
        heard=_heard_validation,
        seen=_seen_validations,
    )


def _asked_together(config, run_dir: str | Path | None) -> list[float]:
    """The sparsities that the sweep whose folder holds this run asks of the same ranking of weights. None of a search,
    whose jobs come one by one: its sets would change with each."""
    from nbhelpers.ledger import Ledger
    from nbhelpers.sparsity_price import ranking

    folder = None if run_dir is None else Path(run_dir).parent.parent
    if folder is None or not (folder / "plan.json").is_file():
        return []
    ledger = Ledger(folder)
    if ledger.plan["kind"] != "sparsity" or ledger.plan.get("search"):
        return []
    ours = ranking(config.model_dump())
    return [job.config["sparsity"] for job in ledger.jobs.values() if ranking(job.config) == ours]


def check_rows(kind: str, config: Mapping[str, Any]) -> None:
    """LookupError, ValueError: what is wrong with the files that a job asks rows of, said before any job begins. The
    hub's rows are not looked at."""
    from nbhelpers import sparsity_price, tasks

    for field in ROWS.get(kind, ()):
        source = config.get(field)
        if source not in (None, tasks.BUNDLED) and not Path(source).expanduser().exists():
            raise LookupError(f"{field}: file {source!r} does not exist; put it there or name another one")
    if kind == "sparsity":
        from nbhelpers.sparsity import SparsityConfig, training_source

        for source in (config["data"], training_source(SparsityConfig(**config))):
            if source is not None:
                sparsity_price.documents(config["task"], source, None)


ROWS = {"sparsity": ("data", "train_data"), "evaluation": ("data", "shots_data")}  # fields that can name a file of rows


def _sparsity_seconds(config) -> float:
    """LookupError where that cannot be known here, in words."""
    from nbhelpers import models, runtime
    from nbhelpers.durations import sparsity_seconds

    far = ["the model"] if models.locate(config.model)[0] == "hub" else []
    far += ["the rows"] if config.data is None else []
    if far:
        raise LookupError(f"{' and '.join(far)} of the hub must be there for that: {CALIBRATE}")
    if config.device is not None and config.device.partition(":")[0] not in ("cpu", runtime.device()):
        raise LookupError(f"device {config.device!r} is not on this machine: {CALIBRATE}")
    return sparsity_seconds(config)


CALIBRATE = "run sweep plan with --calibrate on the machine that will do it"


EARLY = {0: 0, 0.5: 1, 0.9: 2}  # a curve is seen from its ends and its middle


def _resolved_sparsity(config) -> dict[str, Any]:
    """The config without its name and how it is split into passes, and with one value where several mean the same."""
    values = config.model_dump(exclude={"name", "micro_batch_size", "checkpoint_every", "keep_model"})
    if config.is_dense:  # no weight goes, so nothing of how it would be chosen matters
        values |= dict.fromkeys(("pattern", "importance", "scope", "dimension", "mode", "calibration_rows"))
    elif config.pattern == "nm":
        values["scope"] = _any_scope(config)
    if config.tuning == "none":
        values |= dict.fromkeys(("steps", "learning_rate", "batch_size", "lora_rank", "lora_alpha", "validations"))
    return values


def _any_scope(config) -> str:
    """Of pattern nm, which compares weights within its groups whatever the scope says."""
    return type(config).model_fields["scope"].default


def sparsity_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one run: the task's measure as it is, masked and tuned, its interval, and what was proved."""
    metric, merge, mask = result.get("metric"), result.get("merge") or {}, result.get("mask") or {}
    found: dict[str, Any] = {"metric": metric}
    for stage in ("dense", "masked", "tuned"):
        found[stage] = (result.get(stage) or {}).get(metric)
    tuned = result.get("tuned") or {}
    interval = tuned.get(f"{metric}_interval") or {}
    found |= {"tuned_low": interval.get("low"), "tuned_high": interval.get("high"), "n": tuned.get("n")}
    masked = (result.get("masked") or {}).get(f"{metric}_interval") or {}
    found |= {"masked_low": masked.get("low"), "masked_high": masked.get("high")}
    found |= {name: (result.get("protocol") or {}).get(name) for name in ("generated", "dtype", "device")}
    found |= {"mask_sha256": mask.get("sha256"), "measured_sparsity": mask.get("sparsity")}
    found |= {f"merge_{name}": merge.get(name) for name in ("difference", "violations", "withheld")}
    names = ("all_facts_hold", "validation_nll", "tokens_per_second", "steps", "best_step", "overhead_share")
    return found | {name: result.get(name) for name in names}


# Fields of a fine-tuning that decide what it costs.
COSTS = ("model", "data", "method", "steps", "batch_size", "window", "control", "packing", "gradient_checkpointing")


def _resolved_fine_tuning(config) -> dict[str, Any]:
    """The config without its name, how it is split into passes and how often it is kept, and with one value where
    several mean the same computation."""
    from nbhelpers import mask_choice
    from nbhelpers.training import LEARNING_RATES

    values = config.model_dump(exclude={"name", "micro_batch_size", "checkpoint_every", "validations"})
    values["learning_rate"] = config.learning_rate or LEARNING_RATES[config.training().method]
    values["eval_every"] = config.training().eval_every
    if config.method == "full":
        values |= dict.fromkeys(("lora_rank", "lora_alpha"))
    for name in (*mask_choice.FIELDS, "mode", "masks"):
        if not config.is_masked:  # a job without a mask is what it was before there were masks
            values.pop(name)
        elif config.masks is not None and name in mask_choice.FIELDS and name != "sparsity":
            values[name] = None
    if config.is_masked:
        values["sparsity"] = config.share
        if config.masks is None and config.pattern == "nm":
            values["scope"] = _any_scope(config)
    return values


def _fine_tuning_seconds(config) -> float | None:
    from nbhelpers.durations import fine_tuning_phases

    try:
        return sum(fine_tuning_phases(config).values())
    except (LookupError, ValueError):  # data on the hub, or what the job itself refuses with better words
        return None


def fine_tuning_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one fine-tuning run; None where a stage was not run."""
    stages = ("baseline", "masked", "fine_tuned", "control")
    found = {f"{stage}_perplexity": (result.get(stage) or {}).get("perplexity") for stage in stages}
    names = ("improvement_percent", "all_facts_hold", "parameters", "trainable_parameters", "tokens_per_second")
    return found | {name: result.get(name) for name in (*names, "steps", "best_step", "skipped_steps")}


def _heard_validation(now: Mapping[str, Any]) -> tuple[int, float] | None:
    """(step, nats a token) where a report of the training brings a validation before its last step."""
    loss = now.get("validation_nll")
    if now.get("stage") != "training fine_tuned" or loss is None or now["step"] >= now["steps"]:
        return None
    return now["step"], loss


def _seen_validations(run) -> list[tuple[int, float]]:
    """The same from the record of a run."""
    found = [(row["iteration"], row.get("val_loss")) for row in run.metrics if row.get("stage") == "fine_tuned"]
    return [(step, loss) for step, loss in found if step and loss is not None and step < run.config["steps"]]


def _resolved_pruning(config) -> dict[str, Any]:
    """The config without its name, and with one value where several mean the same computation."""
    from nbhelpers.experiments import LEARNING_RATES

    values = config.model_dump(exclude={"name"})
    values["learning_rate"] = config.learning_rate or LEARNING_RATES[config.method]
    if not config.iterative:
        values["heads_per_round"] = None
    if not config.steps:
        values |= dict.fromkeys(("method", "learning_rate", "batch_size", "control"))
    return values


def _pruning_seconds(config) -> float | None:
    from nbhelpers.durations import pruning_phases

    try:
        return sum(pruning_phases(config).values())
    except LookupError:  # a text on the hub: how much there is to do is not known yet
        return None


def pruning_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one pruning run; None where a stage was not run."""
    found = {f"{stage}_perplexity": (result.get(stage) or {}).get("perplexity") for stage in STAGES}
    for name in ("recovery_percent", "improvement_percent", "all_facts_hold"):
        found[name] = result.get(name)
    heads = result.get("pruned_heads")
    return found | {"pruned_heads": None if heads is None else len(heads), "total_heads": result.get("total_heads")}


def _corpus_read(source: str) -> dict[str, str]:
    from nbhelpers import tasks

    return {f"text {source}": tasks.load_corpus(source).sha256}


def _evaluation_reads(config) -> dict[str, str]:
    from nbhelpers.evaluation import questions

    wanted = {name: getattr(config, name) for name in ("shots", "shots_data", "limit")}
    rows, asked = questions(config.task, config.data, **wanted)
    told = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None)
    told = f"{config.task} of {config.data or 'the hub'}" + (f", {told}" if told else "")
    return {told: rows.sha256, f"{told}, as asked": sha256_json([vars(one) for one in asked])}


def _sparsity_reads(config) -> dict[str, str]:
    from nbhelpers.sparsity import SparsityExperiment

    rows, _, corpus = SparsityExperiment._check(config)
    told = f"{config.task} of {config.data or 'the hub'}" + (f", first {config.limit}" if config.limit else "")
    train = f", training rows of {config.train_data}" if config.train_data else ", training rows"
    return {told: rows.sha256, told + train: corpus.sha256}


def _text_file(source: str) -> str | None:
    """sha256 of a text that is a file here; None for what its name alone decides."""
    path = Path(source).expanduser()
    return sha256_known(path) if path.is_file() else None


def _mask_files(place: str) -> str | None:
    from nbhelpers.mask_choice import file_in

    try:
        return sha256_known(file_in(place))
    except LookupError:  # said by the job itself
        return None


def _model_files(name: str) -> dict[str, str] | None:
    """sha256 of the files of a model that lies here; None for a hub id, whose revision is known once it is loaded."""
    from nbhelpers.models import files_fingerprint

    try:
        return files_fingerprint(name)
    except (LookupError, ValueError):  # said by the job itself, so that the other jobs of the plan go on
        return None
