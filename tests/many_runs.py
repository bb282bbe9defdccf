"""Small finished runs for tests of the analysis: written by the tracker, with the numbers that a test asks for."""

from __future__ import annotations

from run_folders import tracker

from nbhelpers.tracking import ExperimentConfig


def a_run(folder, losses=(), result=None, name="try", kind="test", status="finished", **config):
    """A run directory `folder` with a train_loss a step; losses: numbers."""
    with tracker(folder, ExperimentConfig(name=name, kind=kind, **config)) as run:
        for loss in losses:
            run.log_metrics(train_loss=loss)
        run.finish(result if status == "finished" else None, status=status)
    return folder


def pruning_run(folder, base, pruned, tuned, control=None, strategy="gradient", level=0.3, seed=0, **more):
    """A pruning run with these perplexities; recovery as the experiment computes it."""
    stages = {"baseline": base, "pruned": pruned, "fine_tuned": tuned, "control": control}
    result = {stage: None if value is None else {"perplexity": value} for stage, value in stages.items()}
    if tuned is not None and pruned > base:
        result["recovery_percent"] = (pruned - tuned) / (pruned - base) * 100
    result["text"] = {"generated": more.pop("generated", False)}
    config = {"model": "m", "strategy": strategy, "level": level, "seed": seed, "text": "t", **more}
    with tracker(folder, ExperimentConfig(name="pruning", kind="pruning", **config)) as run:
        for step, loss in enumerate((3.0, 2.0, 1.5)):
            measures = {"train_loss": loss, "learning_rate": 1e-3 / (step + 1), "tokens_per_sec": 100.0 + step}
            run.log_metrics(iteration=step, stage="fine_tuned", **measures)
            run.log_eval(stage="fine_tuned", val_loss=loss + 0.1)
        run.finish(result)
    return folder
