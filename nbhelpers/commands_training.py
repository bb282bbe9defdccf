"""What do the commands around training do? `finetune` and `prune-weights`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nbhelpers import ranks
from nbhelpers.commands import Json, Progress, Violation, carry_out, keyword, options_of, with_options


def finetune() -> Callable:
    from nbhelpers.fine_tuning import FineTuningConfig, FineTuningExperiment

    def command(out: Path | None, resume: bool, json: bool, **options) -> None:
        first = ranks.is_first()  # of the processes that torchrun started: the one that reports

        def work() -> dict:
            config = FineTuningConfig(**options)
            told = {"estimated_seconds": expected_seconds(config), "progress": Progress()} if first else {}
            result = FineTuningExperiment.run(config, run_dir=out, resume=resume, **told)
            if result and not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_fine_tuning if first else lambda _: "", json and first)

    out = Annotated[Path | None, typer.Option(help="run directory; None = a new one under runs/")]
    resume = Annotated[bool, typer.Option("--resume", help="go on in --out from its newest complete checkpoint")]
    own = [keyword("out", out, None), keyword("resume", resume, False), keyword("json", Json, False)]
    return with_options(command, [*options_of(FineTuningConfig), *own])


def prune_weights() -> Callable:
    from nbhelpers.weight_pruning import WeightPruningConfig, WeightPruningExperiment

    def command(out: Path | None, json: bool, **options) -> None:
        def work() -> dict:
            result = WeightPruningExperiment.run(WeightPruningConfig(**options), run_dir=out, progress=Progress())
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_weight_pruning, json)

    out = keyword("out", Annotated[Path | None, typer.Option(help="run directory; None = a new one under runs/")], None)
    return with_options(command, [*options_of(WeightPruningConfig), out, keyword("json", Json, False)])


def merge() -> Callable:
    def command(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="model folder of adapters, from qlora or PEFT")],
        out: Annotated[Path, typer.Option(help="new folder for the whole model")],
        device: Annotated[str | None, typer.Option(help="None = the fastest that is here")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import merging

            result = merging.merge(folder, out, device=device)
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_merged, json)

    return command


def show_merged(result: dict) -> str:
    from nbhelpers.facts import Fact

    size = f"{result['parameters']:,} parameters in {result['dtype']}, {result['bytes'] / 1e6:,.1f} MB"
    return "\n".join([size, *(Fact(**fact).line() for fact in result["facts"]), f"model  {result['model_dir']}"])


def show_weight_pruning(result: dict) -> str:
    """The run for people: a line a stage, the verdict, what went and what that gave, the facts, where it lies."""
    from nbhelpers.facts import Fact

    lines = [*stage_lines(result), "", result["verdict"], f"{result['went']}. {result['gain']}"]
    if result["text"]["generated"]:
        lines.append("All of this on text that this project generated itself.")
    lines += ["", *(Fact(**fact).line() for fact in result["facts"])]
    return "\n".join([*lines, "", f"run    {result['run_dir']}", f"model  {result['model_dir']}"])


def stage_lines(result: dict) -> list[str]:
    """A table of the stages that the run has."""
    stages = [stage for stage in ("baseline", "pruned", "masked", "fine_tuned", "control") if result.get(stage)]
    rows = [f"{stage:<12} {result[stage]['perplexity']:>10.4g}" for stage in stages]
    return [f"{'stage':<12} {'perplexity':>10}", *rows]


def show_fine_tuning(result: dict) -> str:
    """The run for people: a line a stage, the verdict, what it took, the facts, where it lies."""
    from nbhelpers.facts import Fact

    lines = [*stage_lines(result), "", result["verdict"]]
    if result["text"]["generated"]:
        lines.append("All of this on text that this project generated itself.")
    lines.append(
        f"{result['steps']} steps, {result['trainable_parameters']:,} of {result['parameters']:,} parameters trained, "
        f"{result['tokens_per_second']:,.0f} tokens a second, packing {result['packing']}"
    )
    lines += estimates_beside_measures(result)
    lines += ["", *(Fact(**fact).line() for fact in result["facts"])]
    return "\n".join([*lines, "", f"run    {result['run_dir']}", f"model  {result['model_dir']}"])


def expected_seconds(config) -> float | None:
    """What the run will take, to stand beside what it took; None where the amount of work is not known yet."""
    from nbhelpers import durations

    try:
        return sum(durations.phases(config).values())
    except (LookupError, ValueError):  # a text on the hub, or what the run itself will refuse with better words
        return None


def estimates_beside_measures(result: dict) -> list[str]:
    """Memory and time as they were measured, each beside its estimate."""
    from nbhelpers.durations import in_words
    from nbhelpers.estimates import megabytes

    used, time = result["memory"], result["time"]
    found = f"{megabytes(used['cuda_peak_bytes'])} of tensors on the GPU"
    if not used["cuda_peak_bytes"]:
        found = f"{megabytes(used['resident_grown_bytes'])} more than before the model was loaded, libraries included"
    estimated = "not known before" if time["estimated_seconds"] is None else in_words(time["estimated_seconds"])
    return [
        f"memory: at most {found} (estimated without libraries: {megabytes(used['estimated_bytes'])})",
        f"time: {in_words(time['seconds'])} (estimated: {estimated})",
    ]
