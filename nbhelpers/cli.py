"""The command line: `nbhelpers COMMAND`. Only the command that is called is imported."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import typer

from nbhelpers import runtime

# name -> (one line of help, function in commands.py); a two-word name is a command of a group
COMMANDS = {
    "env": ("what this machine has, and which models fit", "env"),
    "self-check": ("does everything work here? checked in under half a minute", "self_check"),
    "perplexity": ("perplexity of a model on a text file", "perplexity"),
    "prune-heads": ("close attention heads, fine-tune, and say what it cost", "prune_heads"),
    "generate": ("let a model continue a text", "generate"),
    "notebooks run": ("execute notebooks headless and collect what they found", "notebooks_run"),
    "notebooks refresh": ("execute the committed notebooks and store them with their outputs", "notebooks_refresh"),
    "notebooks colab": ("write each notebook as one file that carries the package and a tiny model", "notebooks_colab"),
}
GROUPS = {"notebooks": "the notebooks, headless"}
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
        body = getattr(import_module("nbhelpers.commands"), function)() if called else _not_loaded
        (groups[group] if group else app).command(last, help=text, cls=getattr(body, "command_class", None))(body)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def _not_loaded() -> None:
    raise RuntimeError("this command was not loaded")


def main() -> None:
    runtime.let_threads_sleep()
    """Run the command line. What it cannot read is said in one line (with --json as JSON too), exit code 2."""
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
