"""What does a notebook need around a run? Set-up, where runs go, how results are shown."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from nbhelpers import colab, curves, earlier, estimates, runtime
from nbhelpers.records import read_json
from nbhelpers.runs import Run
from nbhelpers.stats import digits

if TYPE_CHECKING:
    from nbhelpers.overview import Overview
    from nbhelpers.plots import Figure

runtime.let_threads_sleep()  # here, because a notebook imports this module before torch
RUNS_VARIABLE = "NBHELPERS_RUNS"  # set by the headless runner
SHOWN_RUNS = 10
TRAINED = ("fine_tuned", "control")


def runs_root() -> Path:
    """Where this notebook's runs go: as the headless runner says, else `runs` beside the notebook."""
    return Path(os.environ.get(RUNS_VARIABLE, "runs"))


def setup() -> None:
    """Say where we run and with what; in Colab, add what its image lacks. RuntimeError where it cannot run."""
    runtime.check_supported()
    runtime.prepare_cuda_allocator()
    said = colab.install_missing()
    runtime.quiet_libraries()
    here = runtime.environment(probe=True)
    print(f"running in {here['where']} on {here['device']['type']} ({here['device']['name']})")
    print(", ".join(f"{name} {version}" for name, version in here["libs"].items() if name in ("torch", "transformers")))
    print(*filter(None, [said]), sep="\n", end="\n" if said else "")


def earlier_runs() -> list[Run]:
    """The runs that are there already: beside the notebook, in a mounted Drive, in an archive uploaded beside it."""
    runs = earlier.find_runs(runs_root(), colab.drive_folder(), tell=print)
    print(earlier.table(runs[:SHOWN_RUNS]) if runs else "no earlier runs here")
    if len(runs) > SHOWN_RUNS:
        print(f"and {len(runs) - SHOWN_RUNS} older ones")
    return runs


def settings(config: BaseModel) -> str:
    """The whole config as it was understood, a line a field."""
    values = config.model_dump()
    width = max(20, *map(len, values))
    return "\n".join(f"{name:<{width}} {value}" for name, value in values.items())


def progress() -> Callable[[dict], None]:
    """Prints a line a stage and a validation as the run goes, with the seconds since it began, and what was written.

    Of a text that begins as the first one did (with the same long prompt) only what follows is printed.
    """
    started, last, first = time.monotonic(), [""], []

    def written(sample: str) -> None:
        shared, texts = curves.beginning([*first, sample])
        first[:] = first or [sample]
        print(f"          {'... ' if shared else ''}{texts[-1]!r}")

    def tell(now: dict) -> None:
        stage = now["stage"]
        if stage == "measured":
            print(f"{time.monotonic() - started:6.1f} s  {now['at']}: perplexity {now['perplexity']:.4g}")
            written(now["sample"])
        elif stage.startswith("training ") and stage == last[0] and now.get("validation_nll") is not None:
            perplexity = math.exp(min(now["validation_nll"], 700.0))
            where = f"step {now['step']} of {now['steps']}"
            print(f"{time.monotonic() - started:6.1f} s  {where}: validation perplexity {perplexity:.4g}")
            if now.get("sample"):
                written(now["sample"])
        elif stage != last[0] and stage != "measuring":
            print(f"{time.monotonic() - started:6.1f} s  {stage}")
        last[0] = stage

    return tell


def where(result: Mapping) -> str:
    """Where the run and its model lie, seen from here."""
    return f"run    {os.path.relpath(result['run_dir'])}\nmodel  {os.path.relpath(result['model_dir'])}"


def show(figure) -> None:
    """Display a figure as a picture and print what it holds, so that it can be compared."""
    from IPython.display import Image, display

    from nbhelpers import plots

    width, _ = figure.get_size_inches()
    display(Image(plots.png(figure), width=int(width * 100)))


def show_all(figures: Mapping[str, Figure]) -> None:
    """Display figures one below the other."""
    for figure in figures.values():
        show(figure)


def draw(overview: Overview, name: str) -> None:
    """Display one figure of many runs, one a model, and print what each holds; or why it cannot be drawn."""
    from nbhelpers.analysis_plots import holds

    try:
        figures = overview.figures(name)
    except ValueError as error:  # not of these runs; an unknown name is a LookupError of the cell
        print(f"not drawn: {error}")
        return
    for label, figure in figures.items():
        show(figure)
        print(f"{label + ': ' if label else ''}{holds(figure)}")


def stage_table(result: Mapping) -> str:
    """What is the same on every machine: perplexity without training to 3 digits, and the decisions after training."""
    whole, closed = "test perplexity before", result.get("went")
    if closed is None:
        whole = "test perplexity with all heads"
        closed = f"{len(result['pruned_heads'])} of {result['total_heads']} heads closed"
    lines = [f"{whole:<42} {digits(result['baseline']['perplexity'])}"]
    lines.append(f"{f'with {closed}':<42} {digits(result['pruned']['perplexity'])}")
    if result["fine_tuned"]:
        lines.append(f"{'fine-tuning lowered it':<42} {_below(result, 'fine_tuned', 'pruned')}")
    if result["control"]:
        lines.append(f"{'and beats fine-tuning the whole model':<42} {_below(result, 'fine_tuned', 'control')}")
    text = "generated by this project" if result["text"]["generated"] else result["text"]["source"]
    return "\n".join([*lines, f"{'text':<42} {text}"])


def fine_tuning_table(result: Mapping) -> str:
    """What is the same on every machine: perplexity before training to 3 digits, and the decisions after it."""
    lines = [f"{'test perplexity before':<42} {digits(result['baseline']['perplexity'])}"]
    if result.get("masked"):
        gone = f"with {result['mask']['masked']:,} of {result['mask']['numbers']:,} weights masked"
        lines.append(f"{gone:<42} {digits(result['masked']['perplexity'])}")
    lines.append(f"{'fine-tuning lowered it':<42} {_below(result, 'fine_tuned', 'baseline')}")
    lines.append(f"{'by more than half':<42} {result['improvement_percent'] > 50}")
    if result["control"]:
        lines.append(f"{'and beats the control':<42} {_below(result, 'fine_tuned', 'control')}")
    trained = f"{result['trainable_parameters']:,} of {result['parameters']:,}"
    lines.append(f"{'parameters trained':<42} {trained}")
    text = result["text"]["source"] + (", generated by this project" if result["text"]["generated"] else "")
    return "\n".join([*lines, f"{'text':<42} {text}"])


def took(result: Mapping) -> str:
    """What fine-tuning took beside what was expected of it: time and memory."""
    from nbhelpers import durations  # imports torch

    held, speed = result["memory"], f"{result['tokens_per_second']:,.0f} tokens a second"
    seconds, expected = result["time"]["seconds"], result["time"]["estimated_seconds"]
    beside = f" (about {durations.in_words(expected)} expected)" if expected is not None else ""
    where, most = "GPU memory reached", held["cuda_peak_bytes"]
    if not most:
        where, most = "this process grew by", held["resident_grown_bytes"]
    return (
        f"It took {durations.in_words(seconds)}{beside}, at {speed}; "
        f"{where} {estimates.megabytes(most)} ({estimates.megabytes(held['estimated_bytes'])} estimated for the model)."
    )


def events(trainings: Mapping[str, Mapping]) -> str:
    """What happened in the trainings and what was done about it, a line each."""
    lines = [f"{stage}: {line}" for stage, curve in trainings.items() for line in curves.told(curve)]
    return "\n".join(lines) or "nothing out of the ordinary happened"


def saved(result: Mapping) -> str:
    """The files of the model that a run saved, and how it is used elsewhere."""
    files = sorted(path.name for path in Path(result["model_dir"]).iterdir())
    use = f"nbhelpers generate --model {Path(result['run_dir']).name} --prompt TEXT"
    return f"model files   {', '.join(files)}\nuse it        {use}"


def removal(result: Mapping) -> str:
    """What taking the heads out gave; empty where they were only closed."""
    if result.get("parameters_after") is None:
        return ""
    before, after = result["parameters_before"], result["parameters_after"]
    speed = result["tokens_per_second_after"] / result["tokens_per_second_before"]
    return (
        f"Without the closed heads: {after:,} parameters instead of {before:,} ({1 - after / before:.1%} fewer), "
        f"{result['bytes_after']:,} bytes instead of {result['bytes_before']:,}, "
        f"{speed:.2f} times as many tokens a second here. The saved model loads with {result['loads_with']}."
    )


def what_went(result: Mapping) -> str:
    """What was pruned, a line a layer: heads by number, weights and channels by how many."""
    if result.get("mask"):
        layers = [f"{one['name']}: {one['gone']:,} of {one['numbers']:,}" for one in result["mask"]["per_layer"]]
        share = f"the mask reaches {result['mask']['coverage']:.1%} of all parameters"
        return "\n".join([result["went"], share, *result["mask"]["covered"], *layers])
    if result.get("channels"):
        found = result["channels"]
        return f"{result['went']}\nevery layer keeps {found['after']} of {found['before']}"
    return closed_heads(result)


def closed_heads(result: Mapping) -> str:
    """The closed heads, a line a layer."""
    layers: dict[int, list[int]] = {}
    for layer, head in result["pruned_heads"]:
        layers.setdefault(layer, []).append(head)
    return "\n".join(f"layer {layer}: heads {', '.join(map(str, heads))}" for layer, heads in layers.items()) or "none"


def curve_facts(curves: Mapping[str, Mapping]) -> str:
    """What can be said of each training on every machine."""
    lines = []
    for stage, curve in curves.items():
        nlls = [nll for _, nll in curve["validation_nlls"]]
        below = min(nlls) < nlls[0]
        lines.append(f"{stage}: {curve['steps']} steps, {curve['skipped_steps']} skipped, best is below start: {below}")
    return "\n".join(lines) or "not fine-tuned"


def _below(result: Mapping, first: str, second: str) -> bool:
    return result[first]["perplexity"] < result[second]["perplexity"]


def facts(result: Mapping) -> str:
    """Every checked fact, a line each."""
    return "\n".join(f"{'OK    ' if fact['ok'] else 'FAILED'} {fact['says']}" for fact in result["facts"])


def learning_curves(result: Mapping) -> dict[str, dict]:
    """The trainings of a run as plots.learning_curves takes them, read from the run directory."""
    found = {}
    for stage in TRAINED:
        path = Path(result["run_dir"]) / "artefacts" / f"training_{stage}.json"
        if path.is_file():
            found[stage] = read_json(path)
    return found
