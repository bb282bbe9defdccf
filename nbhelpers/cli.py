"""The command line: `nbhelpers COMMAND`. Only the command that is called is imported."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import typer

from nbhelpers import runtime

# name -> (one line of help, module.function that makes the command); a two-word name is a command of a group
COMMANDS = {
    "env": ("what this machine has, and which models fit", "commands.env"),
    "self-check": ("does everything work here? checked in under half a minute", "commands.self_check"),
    "quick-test": ("mask, LoRA, merge, evaluation, checked on a tiny model", "commands_sweep.quick_test"),
    "perplexity": ("perplexity of a model on a text file", "commands.perplexity"),
    "prune-heads": ("close attention heads, fine-tune, and say what it cost", "commands.prune_heads"),
    "prune-weights": ("mask weights or remove MLP channels, and say what it cost", "commands_training.prune_weights"),
    "finetune": ("fine-tune a model, wholly or by LoRA; resumes after a kill", "commands_training.finetune"),
    "merge": ("a model tuned in 4 bits, as a whole one", "commands_training.merge"),
    "evaluate": ("BoolQ, HellaSwag, GSM8K, as the harness scores them", "commands_evaluation.evaluate"),
    "generate": ("let a model continue a text", "commands.generate"),
    "notebooks run": ("execute notebooks headless and collect what they found", "commands.notebooks_run"),
    "notebooks refresh": (
        "execute the committed notebooks and store them with their outputs",
        "commands.notebooks_refresh",
    ),
    "notebooks colab": (
        "write each notebook as one file that carries the package and a tiny model",
        "commands.notebooks_colab",
    ),
    "masks create": ("choose which weights go: nested masks of several sparsities", "commands_masks.masks_create"),
    "masks verify": ("is a mask file whole, and are a model's masked weights zero?", "commands_masks.masks_verify"),
    "masks stats": ("how many weights go, in all and in each projection", "commands_masks.masks_stats"),
    "masks overlap": ("what two masks keep in common", "commands_masks.masks_overlap"),
    "masks apply": ("set a model's masked weights to zero and save it", "commands_masks.masks_apply"),
    "sweep plan": ("what a plan would run: jobs, aliases, time", "commands_sweep.sweep_plan"),
    "sweep run": ("do what is missing of a plan, in a folder that survives a kill", "commands_sweep.sweep_run"),
    "sweep worker": ("do jobs of a sweep's shared folder, under any scheduler", "commands_sweep.sweep_worker"),
    "sweep status": ("where each job of a sweep stands", "commands_sweep.sweep_status"),
    "sweep prefetch": ("fetch and hash a plan's models and data for nodes offline", "commands_sweep.sweep_prefetch"),
    "sweep report": ("table, curves, headline and proofs of a sparsity sweep", "commands_sweep.sweep_report"),
    "sweep retry": ("plan failed jobs again", "commands_sweep.sweep_retry"),
    "compare run": ("large models as they are against small ones fine-tuned", "commands_comparison.compare_run"),
    "compare clear-cache": ("delete kept answers of comparisons", "commands_comparison.compare_clear_cache"),
    "compare migrate": ("read an older config or results file", "commands_comparison.compare_migrate"),
    "interview": ("ask trained models about interviews in a folder", "commands_comparison.interview"),
    "report": ("one self-contained page about a run or a folder of runs", "commands_comparison.report"),
    "runs list": ("which runs lie in these folders", "commands_runs.runs_list"),
    "runs show": ("one run whole: its config and what it measured", "commands_runs.runs_show"),
    "runs compare": ("runs beside each other, the best one, means over seeds", "commands_runs.runs_compare"),
    "runs export": ("runs as csv or json, without texts of users", "commands_runs.runs_export"),
    "runs watch": ("a table that follows running runs", "commands_runs.runs_watch"),
    "runs log": ("write or refresh EXPERIMENT_LOG.md", "commands_runs.runs_log"),
}
GROUPS = {
    "runs": "look at runs: list, compare, export, watch",
    "compare": "large models as they are against small ones fine-tuned",
    "masks": "which weights of a model go",
    "notebooks": "the notebooks, headless",
    "sweep": "a grid of jobs from one plan",
}
NAME = "nbhelpers"


def build(arguments: list[str]) -> typer.Typer:
    """The app in which the command named by `arguments` is real and every other one a line of help."""
    app = typer.Typer(
        name=NAME, help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    groups = {name: typer.Typer(help=text, no_args_is_help=True) for name, text in GROUPS.items()}
    app.callback()(lambda: None)
    words = [word for word in arguments if not word.startswith("-")]
    for name, (text, function) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        called = words[: name.count(" ") + 1] == name.split()
        body = load(function) if called else _not_loaded
        (groups[group] if group else app).command(last, help=text, cls=getattr(body, "command_class", None))(body)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def load(function: str):
    """The command that `module.function` of this package makes."""
    module, _, name = function.partition(".")
    return getattr(import_module(f"nbhelpers.{module}"), name)()


def _not_loaded() -> None:
    raise RuntimeError("this command was not loaded")


def main() -> None:
    """Run the command line. What it cannot read is said in one line (with --json as JSON too), exit code 2."""
    runtime.let_threads_sleep()
    arguments = sys.argv[1:]
    try:
        code = build(arguments)(arguments, prog_name=NAME, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # only typer's own errors have one
            raise
        code = _refuse(error, as_json="--json" in arguments)
    sys.exit(code)


def _refuse(error, as_json: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    command = error.ctx.command_path if getattr(error, "ctx", None) else NAME
    message = " ".join(f"{error.format_message().rstrip('.')}; see {command} --help".split())
    message = message[:1].lower() + message[1:]
    if as_json:
        typer.echo(json.dumps({"error": message}))
    else:
        typer.echo(f"error: {message}", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
