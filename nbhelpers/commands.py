"""What does each command do? Build a config, call a function, print: text for people, or one JSON object last.

Exit codes: 0 done; 1 the run failed, diverged or found a violation; 2 bad input; 130 interrupted. Logs go to stderr.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from nbhelpers import records, runtime
from nbhelpers.errors import is_bad_input, one_line
from nbhelpers.tracking import Diverged, Interrupted

PERPLEXITY_WINDOW = 512  # tokens per window of the perplexity command where the model has the positions
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]


class Violation(RuntimeError):
    """The work was done, but a checked fact does not hold; `result` says which."""

    def __init__(self, result: dict) -> None:
        super().__init__(
            "a checked fact does not hold: " + ", ".join(f["name"] for f in result["facts"] if not f["ok"])
        )
        self.result = result


def carry_out(work: Callable[[], dict], show: Callable[[dict], str], as_json: bool) -> None:
    """Do the work, print its result, and leave with the exit code that belongs to what happened."""
    result, code = None, DONE
    try:
        _quiet()
        with redirect_stdout(sys.stderr):  # what libraries print is no result
            result = work()
    except Violation as error:
        result, code = error.result, FAILED
        _say(error)
    except (KeyboardInterrupt, Interrupted) as error:
        result, code = {"error": str(error) or "interrupted"}, INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last place: whatever it was becomes an exit code and one line
        code = BAD_INPUT if is_bad_input(error) else FAILED
        if code == FAILED and not isinstance(error, Diverged | FloatingPointError):
            traceback.print_exc()
        result = {"error": one_line(error)}
    if as_json:
        typer.echo(records.canonical_json(records.plain(result)))
    elif "error" in result:
        _say(result["error"])
    elif text := show(result):
        typer.echo(text)
    raise typer.Exit(code)


def _say(message: object) -> None:
    typer.echo(f"error: {message}" if not isinstance(message, Exception) else f"error: {one_line(message)}", err=True)


def _quiet() -> None:
    """Logs to stderr, and no progress bars of other libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(os.environ.get("NBHELPERS_LOG", "WARNING").upper())  # a run lowers its logger for log.txt
    logging.basicConfig(handlers=[handler], format="%(message)s")
    runtime.quiet_libraries()


def options_of(config: type[BaseModel], *, without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """One command-line option a config field, with its default, help and choices: the config says it once."""
    parameters = []
    for name, field in config.model_fields.items():
        if name in without:
            continue
        flag = f"--{name.replace('_', '-')}"
        flags = (f"{flag}/--no-{flag[2:]}",) if field.annotation is bool else (flag,)
        choices = ", ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
        option = typer.Option(*flags, help=field.description + (f": {choices}" if choices else ""))
        kind = field.annotation if field.annotation in (bool, str) else _plain_type(field.annotation)
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
            )
        )
    return parameters


def _plain_type(annotation: Any) -> Any:
    """The type in which the shell's text is read; the config checks bounds and choices."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    base = next((part for part in parts if part in (int, float)), str)
    return base | None if NoneType in parts else base


def with_options(function: Callable, parameters: list[inspect.Parameter]) -> Callable:
    """`function(**options)` as typer sees it: with these options."""
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def prune_heads() -> Callable:
    from nbhelpers.experiments import PruningConfig, PruningExperiment

    def command(out: Path | None, json: bool, **options) -> None:
        def work() -> dict:
            result = PruningExperiment.run(PruningConfig(**options), run_dir=out, progress=Progress())
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_pruning, json)

    out = keyword("out", Annotated[Path | None, typer.Option(help="run directory; None = a new one under runs/")], None)
    return with_options(command, [*options_of(PruningConfig), out, keyword("json", Json, False)])


def show_pruning(result: dict) -> str:
    """The run for people: a line a stage, the verdict, the facts, where it lies."""
    from nbhelpers.facts import Fact

    lines = [f"{'stage':<12} {'perplexity':>10}"]
    for stage in ("baseline", "pruned", "fine_tuned", "control"):
        if result[stage]:
            lines.append(f"{stage:<12} {result[stage]['perplexity']:>10.4g}")
    lines += ["", result["verdict"]]
    if result["loads_with"]:
        lines += [_show_removal(result)]
    if result["text"]["generated"]:
        lines.append("All of this on text that this project generated itself.")
    lines += [
        "",
        *(Fact(**fact).line() for fact in result["facts"]),
    ]
    return "\n".join([*lines, "", f"run    {result['run_dir']}", f"model  {result['model_dir']}"])


def _show_removal(result: dict) -> str:
    """Before -> after the closed heads were taken out, in two lines."""
    rows = [f"{result[f'parameters_{at}']:,}" for at in ("before", "after")]
    size = [f"{result[f'bytes_{at}'] / 1e6:.4g}" for at in ("before", "after")]
    speed = [f"{result[f'tokens_per_second_{at}']:,.0f}" for at in ("before", "after")]
    return (
        f"Removed {len(result['pruned_heads'])} of {result['total_heads']} heads: {' -> '.join(rows)} parameters, "
        f"{' -> '.join(size)} MB of weights, {' -> '.join(speed)} tokens/s.\n"
        f"The saved model loads with {result['loads_with']}"
        + ("." if result["loads_with"] != "nbhelpers" else " alone: its architecture's config cannot say what is left.")
    )


class Progress:
    """One line on stderr, rewritten in place on a terminal, a line a stage elsewhere."""

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, now: dict) -> None:
        stage = now["stage"]
        done, total = now.get("done", now.get("step")), now.get("total", now.get("steps"))
        text = f"{stage} {now.get('at', '')}".strip() + (f" {done}/{total}" if total else "")
        if "train_loss" in now and now["train_loss"] is not None:
            text += f"  loss {now['train_loss']:.3f}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            if stage != self.last:
                sys.stderr.write("\n")
        elif stage != self.last:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        self.last = stage


def perplexity() -> Callable:
    def command(
        model: Annotated[str, typer.Option(help="bundled name, local folder or hub id")],
        text: Annotated[str, typer.Option(help=".txt or .jsonl file, scored whole; or bundled: its test part")],
        window: Annotated[
            int | None, typer.Option(help="tokens per window; None = 512, or the model's positions")
        ] = None,
        limit_tokens: Annotated[int | None, typer.Option(help="cut the token stream to this many", min=1)] = None,
        dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
        quantization: Annotated[str | None, typer.Option(help="8bit or 4bit")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import data, evaluate, models
            from nbhelpers.stages import check_window

            size = check_window(window, models.load_config(model), default=PERPLEXITY_WINDOW)
            documents = data.load_corpus(text).test if text == data.BUNDLED else data.read_documents(text)
            rows = data.rows(models.load_tokenizer(model), documents, size, limit_tokens)
            loaded = models.load_model(model, dtype=dtype, quantization=quantization)
            result = vars(evaluate.perplexity(loaded.model, rows)) | {"window": size, "generated": text == data.BUNDLED}
            return result | {"model": model, "text": text, "dtype": str(next(loaded.model.parameters()).dtype)[6:]}

        carry_out(work, _show_perplexity, json)

    return command


def _show_perplexity(found: dict) -> str:
    text = (
        f"perplexity {found['perplexity']:.4f}  (nll {found['nll']:.4f} nats a token, {found['tokens']} scored tokens "
        f"in {found['windows']} windows of {found['window']})"
    )
    return text + ("\nMeasured on text that this project generated itself." if found["generated"] else "")


def generate() -> Callable:
    def command(
        model: Annotated[str, typer.Option(help="bundled name, local folder, run directory or hub id")],
        prompt: Annotated[str, typer.Option(help="how the text begins")],
        max_new_tokens: Annotated[int, typer.Option(help="tokens to write", min=1)] = 60,
        temperature: Annotated[float, typer.Option(help="0 = always the likeliest token", min=0)] = 0.8,
        seed: Annotated[int, typer.Option(help="seed of the sampling", min=0)] = 0,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import attention, evaluate, models
            from nbhelpers.architecture import is_supported

            loaded = models.load_model(model)
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            text = evaluate.generate(loaded.model, loaded.tokenizer, prompt, **options)
            closed = attention.closed_heads(loaded.model) if is_supported(loaded.model) else []
            return {"text": text, "model": model, "closed_heads": len(closed), **options}

        carry_out(work, lambda found: found["text"], json)

    return command


def env() -> Callable:
    def command(
        job: Annotated[str, typer.Option(help="what a model should fit for")] = "lora",
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import machine

            return machine.describe(job)

        carry_out(work, show_environment, json)

    return command


def show_environment(found: dict) -> str:
    from nbhelpers import machine

    return machine.environment_text(found, sums=True)


def self_check() -> Callable:
    from nbhelpers.selfcheck import SelfCheckConfig, run_selfcheck

    def command(out: Path | None, json: bool, **options) -> None:
        def work() -> dict:
            result = run_selfcheck(SelfCheckConfig(**options), run_dir=out, progress=Progress())
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_self_check, json)

    out = keyword("out", Annotated[Path | None, typer.Option(help="run directory; None = a new one under runs/")], None)
    return with_options(command, [*options_of(SelfCheckConfig), out, keyword("json", Json, False)])


def show_self_check(result: dict) -> str:
    """Every check on a line, the verdict, and where its record lies."""
    from nbhelpers.facts import Fact

    lines = [*(Fact(**fact).line() for fact in result["facts"]), "", result["verdict"]]
    return "\n".join([*lines, f"in {result['seconds']:.1f} s, run {result['run_dir']}"])


class PairedParameters(TyperCommand):
    """A command with `-p NAME VALUE`: typer knows no repeated option of two words, so they travel as NAME=VALUE."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_pairs(args))


def join_pairs(arguments: list[str]) -> list[str]:
    """`-p level 0.5` as `-p level=0.5`; all else as it is.

    >>> join_pairs(["01_pruning", "-p", "level", "0.5", "--json"])
    ['01_pruning', '-p', 'level=0.5', '--json']
    """
    joined, rest = [], list(arguments)
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("-p", "--parameter") and rest:
            name = rest.pop(0)
            joined.append(f"{name}={rest.pop(0)}" if rest and "=" not in name else name)
    return joined


def split_pairs(pairs: list[str]) -> dict[str, str]:
    """{name: value} of NAME=VALUE texts; ValueError for one without a value."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"parameter {pair!r} needs a value: -p NAME VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def notebooks_run() -> Callable:
    def command(
        names: Annotated[
            list[str] | None, typer.Argument(help="notebooks by name, such as 01_pruning; none = all")
        ] = None,
        parameter: Annotated[
            list[str] | None,
            typer.Option("-p", "--parameter", metavar="NAME VALUE", help="a notebook's parameter, may be repeated"),
        ] = None,
        out: Annotated[Path, typer.Option(help="folder for the executed notebooks, runs, index and archive")] = Path(
            "results"
        ),
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import headless

            result = headless.run_notebooks(names or [], split_pairs(parameter or []), out, progress=Progress())
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, lambda found: found["summary"], json)

    command.command_class = PairedParameters
    return command


def notebooks_refresh() -> Callable:
    def command(
        names: Annotated[list[str] | None, typer.Argument(help="notebooks by name; none = all")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import headless

            return {"notebooks": [str(path) for path in headless.refresh(names or [])]}

        carry_out(work, lambda found: "\n".join(found["notebooks"]), json)

    return command


def notebooks_colab() -> Callable:
    def command(
        names: Annotated[list[str] | None, typer.Argument(help="notebooks by name; none = all")] = None,
        out: Annotated[Path, typer.Option(help="folder for the self-contained notebooks")] = Path("dist/colab"),
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import selfcontained

            return {"notebooks": selfcontained.write_all(out, names or [])}

        carry_out(work, _show_self_contained, json)

    return command


def _show_self_contained(found: dict) -> str:
    return "\n".join(
        f"{row['path']}  {row['bytes'] / 1e6:.1f} MB, carries {', '.join(row['models'])}" for row in found["notebooks"]
    )
