"""What do the commands around the comparison do? `compare run|clear-cache|migrate`, `interview`, `report`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nbhelpers.commands import Json, Progress, Violation, carry_out, keyword, options_of, with_options

OWN = ("llm_models", "slm_models", "baselines")  # fields whose options are made here

GATES = {True: "gated (its hub page asks for consent first)", False: "not gated", None: "gate unknown"}


def compare_run() -> Callable:
    from nbhelpers.comparison_config import ComparisonConfig

    def command(out, config, force_recompute, clear_cache, resume, json, **options):
        def work() -> dict:
            from nbhelpers.comparison import Comparison
            from nbhelpers.comparison_data import licences

            made = ComparisonConfig(**(_read(config) | _asked(options, force_recompute)))
            for name, found in licences(made).items():
                typer.echo(f"{name}: licence {found['licence']}, {GATES[found['gated']]}", err=True)
            if clear_cache:
                from nbhelpers import kept_answers

                kept_answers.clear(Path("runs") if out is None else out.parent)
            result = Comparison.run(made, run_dir=out, resume=resume, progress=Told())
            write_report(result)
            if not result["all_facts_hold"]:
                raise Violation(result)
            return result

        carry_out(work, show_comparison, json)

    def asked(kind: Any, text: str, *flags: str) -> Any:
        return Annotated[kind, typer.Option(*flags, help=text)]

    own = [
        keyword("out", asked(Path | None, "run directory; None = a new one under runs/"), None),
        keyword("config", asked(Path | None, "YAML or JSON file with these fields; options given here win"), None),
        keyword("model_llm", asked(list[str] | None, "a large model, asked as it is; may be repeated"), None),
        keyword("model_slm", asked(list[str] | None, "a small model, to be fine-tuned; may be repeated"), None),
        keyword("llm_4bit", asked(bool, "weights of --model-llm in 4 bits", "--llm-4bit"), False),
        keyword("slm_4bit", asked(bool, "weights of --model-slm in 4 bits, tuned by qlora", "--slm-4bit"), False),
        keyword("baselines", asked(str | None, "majority,nearest,tfidf_linear, or some of them"), None),
        keyword("force_recompute", asked(bool, "ask and tune anew, whatever was kept", "--force-recompute"), False),
        keyword("clear_cache", asked(bool, "delete kept answers beside --out first", "--clear-cache"), False),
        keyword("resume", asked(bool, "go on in --out where it was killed or stopped", "--resume"), False),
        keyword("json", Json, False),
    ]
    fields = [_optional(option) for option in options_of(ComparisonConfig, without=(*OWN, "cache"))]
    return with_options(command, [*own, *fields])


def _asked(options: Mapping[str, Any], force_recompute: bool) -> dict[str, Any]:
    """The fields that options of the command line set."""
    given = dict(options)
    for side in ("llm", "slm"):
        names, small = given.pop(f"model_{side}"), given.pop(f"{side}_4bit")
        if small and not names:
            raise ValueError(f"--{side}-4bit is for models of --model-{side}; in a config file, say load_in_4bit there")
        if names:
            given[f"{side}_models"] = tuple({"name": name, "load_in_4bit": small} for name in names)
    return {name: value for name, value in given.items() if value is not None} | (
        {"cache": False} if force_recompute else {}
    )


def _optional(option: inspect.Parameter) -> inspect.Parameter:
    """An option whose absence leaves the field to the config file, or to its default, which the help names."""
    kind, about = option.annotation.__origin__, option.annotation.__metadata__[0]
    if option.default is not None and option.default != "":
        about.help += f" (default: {option.default})"  # in [] it would be markup
    about.show_default = False
    return option.replace(default=None, annotation=Annotated[kind | None, about])


def _read(config: Path | None) -> dict[str, Any]:
    from nbhelpers import yaml_files

    found = {} if config is None else yaml_files.read(config, "config")
    if not isinstance(found, Mapping):
        raise ValueError(f"config '{config}' must be a mapping of fields, got {type(found).__name__}")
    return {str(name): value for name, value in found.items()}


class Told(Progress):
    """Progress with the model at work, what it got right, and interim verdicts as they come."""

    def __call__(self, now: dict) -> None:
        interim = now.get("interim")
        done = {"done": now["right"]} if now["stage"] == "answered" else {}
        super().__call__(now | done | {"at": f"{now.get('key', '')} {now.get('part', '')}".strip()})
        if interim:
            typer.echo(interim, err=True)
        if now["stage"] == "from before":
            typer.echo(f"{now['key']}: {now['says']}", err=True)


def write_report(result: dict) -> None:
    """report.html beside the run's other files."""
    from nbhelpers import comparison_report

    comparison_report.write(Path(result["run_dir"]))


def show_comparison(result: dict) -> str:
    """The run for people: the verdict, a line an entry, its curves' sentences, facts that fail, where it lies."""
    from nbhelpers.facts import Fact

    measure = result["headline"]
    lines = [result["verdict"], "", f"{measure:<44} {'[95 %]':>16} {'macro F1':>9} {'s/dialogue':>11}"]
    for key, entry in sorted(result["models"].items(), key=lambda item: -(item[1][measure] or 0)):
        if entry[measure] is None:
            lines.append(f"{key:<36} not measured")
            continue
        bounds, seconds = entry["intervals"][measure], (entry["performance"] or {}).get("seconds_per_dialogue")
        took = f"{'':>11}" if seconds is None else f"{seconds:>11.4f}"
        between = f"[{bounds['low']:.3f}, {bounds['high']:.3f}]"
        lines.append(f"{key:<36} {entry[measure]:>7.3f} {between:>16} {entry['macro_f1']:>9.3f} {took}")
    if result["text"]["generated"]:
        lines += ["", "All of this on dialogues that this project generated itself."]
    for part in ("break_even", "ensemble"):
        if result[part]:
            lines.append(result[part]["sentence"])
    if result["budget"]:
        lines.append(result["budget"]["text"])
    if merged := result.get("merged"):
        where = f"models/{merged['key']}/merged, a whole model in {merged.get('dtype')}"
        lines.append(f"merged {where}" if "error" not in merged else f"not merged, adapters alone: {merged['error']}")
    broken = [
        Fact(**{k: v for k, v in fact.items() if k != "model"}).line() for fact in result["facts"] if not fact["ok"]
    ]
    lines += [
        "",
        *broken,
        f"{sum(fact['ok'] for fact in result['facts'])} of {len(result['facts'])} checked facts hold",
    ]
    folder = result["run_dir"]
    return "\n".join([*lines, result["notice"], "", f"run    {folder}", f"report {folder}/report.html"])


def compare_clear_cache() -> Callable:
    def command(
        root: Annotated[Path, typer.Option(help="folder that holds the runs")] = Path("runs"),
        older_than: Annotated[float | None, typer.Option(help="only answers older than so many days")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import kept_answers

            return {"deleted": kept_answers.clear(root, older_than)}

        carry_out(work, lambda found: f"deleted kept answers of {found['deleted']} model states under {root}", json)

    return command


def report() -> Callable:
    def command(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory, or any folder of runs")],
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import run_report

            return {"report": str(run_report.write(folder))}

        carry_out(work, lambda found: found["report"], json)

    return command


def interview() -> Callable:
    def command(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of JSON files, one an interview")],
        model: Annotated[list[str], typer.Option(help="a tuned model's folder; may be repeated")],
        out: Annotated[Path | None, typer.Option(help="write the result there too, as JSON")] = None,
        lenient: Annotated[bool, typer.Option(help="leave out files that are no interviews, and list them")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; None = what is found")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import interviews, label_answers, records

            taught = {name: label_answers.prompts_of(name) for name in model}
            kinds = {one.wording.kind for one in taught.values()}
            if len(kinds) > 1:
                raise ValueError("some of these models were taught codes and some labels: ask them one kind at a time")
            labels = set().union(*(one.labels for one in taught.values()))
            result = interviews.run(
                folder,
                model,
                lambda name, dialogues: label_answers.ask(name, dialogues, device=device),
                kind=kinds.pop(),
                labels=labels,
                lenient=lenient,
            )
            if out is not None:
                records.write_json(out, records.plain(result))
            return result

        carry_out(work, show_interviews, json)

    return command


def show_interviews(result: dict) -> str:
    """The answers for people: a line a model and interview, then a line a model."""
    from nbhelpers import interviews

    lines = [f"{'interview':<24} {'expected':<12} {'answer':<12} {'':<6} model"]
    for row in interviews.table(result):
        said = [row["expected"] or "", row["answer"] or "none", {True: "right", False: "wrong", None: ""}[row["right"]]]
        lines.append(f"{row['interview']:<24} {said[0]:<12} {said[1]:<12} {said[2]:<6} {row['model']}")
    lines.append("")
    for row in result["summary"]:
        if row["accuracy"] is None:
            lines.append(f"{row['model']}: {row['n']} answered, none has an expected label")
            continue
        between = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"{row['model']}: {row['right']} of {row['with_expected_label']} right {between}")
    lines += [f"left out: {line}" for line in result["left_out"]]
    lines += [
        f"{one}: its expected label is none that the models know" for one in result["label_not_known_to_the_models"]
    ]
    return "\n".join([*lines, "", result["notice"]])


def compare_migrate() -> Callable:
    def command(
        file: Annotated[Path, typer.Argument(metavar="FILE", help="an older config or results file, JSON or YAML")],
        slm_name: Annotated[str | None, typer.Option(help="which small model Finetuned_SLM was")] = None,
        percent: Annotated[
            bool | None, typer.Option(help="whether its accuracies are percent; None = told apart")
        ] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import migration

            path, found = migration.write(file, slm_name=slm_name, percent=percent)
            return {"kind": found.kind, "file": str(path), "notes": list(found.notes)}

        carry_out(work, show_migrated, json)

    return command


def show_migrated(found: dict) -> str:
    return "\n".join([*found["notes"], f"{found['kind']} written to {found['file']}"])
