"""What does the command around tasks do? `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nbhelpers.commands import Json, Progress, Violation, carry_out, keyword, options_of, with_options


def evaluate() -> Callable:
    from nbhelpers.evaluation import EvaluationConfig, EvaluationExperiment

    def command(out: Path | None, resume: bool, json: bool, **options) -> None:
        def work() -> dict:
            config = EvaluationConfig(**options)
            result = EvaluationExperiment.run(config, run_dir=out, resume=resume, progress=Progress())
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_evaluation, json)

    out = Annotated[Path | None, typer.Option(help="run directory; None = a new one under runs/")]
    resume = Annotated[bool, typer.Option("--resume", help="go on in --out with the documents that have no answer yet")]
    own = [keyword("out", out, None), keyword("resume", resume, False), keyword("json", Json, False)]
    return with_options(command, [*options_of(EvaluationConfig), *own])


def show_evaluation(result: dict) -> str:
    """The run for people: the verdict, a line a measure, its protocol, what was left out, facts, where it lies."""
    from nbhelpers.facts import Fact

    lines = [result["verdict"], ""]
    for name in [key.removesuffix("_interval") for key in result if key.endswith("_interval")]:
        error = result.get(f"{name}_stderr")
        lines.append(f"{name:<22} {result[name]:.4f}" + ("" if error is None else f" +- {error:.4f} (standard error)"))
    if "tokens" in result:
        lines.append(f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['words']:,} words were scored")
    if result["invalid"]:
        lines.append(f"{result['invalid']} of {result['n']} documents had no valid answer and count as wrong")
    protocol = result["protocol"]
    lines.append("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None))
    lines += [f"left out: {problem}" for problem in result["problems"]]
    if result["documents_per_second"]:
        lines.append(f"{result['documents_per_second']:,.1f} documents a second")
    lines += ["", *(Fact(**fact).line() for fact in result["facts"])]
    return "\n".join([*lines, "", f"run    {result['run_dir']}", f"answers {result['run_dir']}/predictions.jsonl"])
