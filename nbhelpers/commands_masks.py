"""What do the commands of `nbhelpers masks` do? Create, verify, stats, overlap and apply of weight masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nbhelpers.commands import Json, Violation, carry_out

Model = Annotated[str, typer.Option(help="bundled name, local folder, run directory or hub id")]
Place = Annotated[Path, typer.Argument(metavar="DIR", help="mask file, or the folder that masks create wrote")]
Which = Annotated[float | None, typer.Option(help="which of the file's sparsities; None = the only one")]


class Violated(Violation):
    """Weights that the mask leaves out are not zero."""

    def __init__(self, result: dict) -> None:
        RuntimeError.__init__(
            self, f"{result['violations']:,} masked weights are not zero, first in {result['broken'][0]}"
        )
        self.result = result


def masks_create() -> Callable:
    def command(
        model: Model,
        out: Annotated[Path, typer.Option(help="folder for the masks")],
        sparsity: Annotated[list[float], typer.Option(help="share of weights that go, 0-1; may be repeated")],
        pattern: Annotated[str, typer.Option(help="unstructured, structured or nm")] = "unstructured",
        importance: Annotated[str, typer.Option(help="random, magnitude, gradient, taylor, wanda, ...")] = "magnitude",
        scope: Annotated[str | None, typer.Option(help="layer, row or global; None = the pattern's first")] = None,
        dimension: Annotated[str, typer.Option(help="structured: outputs, inputs or channels")] = "outputs",
        group: Annotated[int, typer.Option(help="nm: M, of which sparsity leaves N out")] = 4,
        data: Annotated[str | None, typer.Option(help="text or task to score on, where that is needed")] = None,
        rows: Annotated[int, typer.Option(help="rows of it")] = 128,
        seed: Annotated[int, typer.Option(help="seed of random scores and of the rows drawn")] = 0,
        suffix: Annotated[str, typer.Option("--format", help="safetensors, pt or npz")] = "safetensors",
        accept_low_coverage: Annotated[bool, typer.Option(help="also where not all projections are reached")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; None = what is found")] = None,
        json: Json = False,
    ) -> None:
        options = {"pattern": pattern, "dimension": dimension, "group": group, "scope": scope}

        def work() -> dict:
            from nbhelpers import mask_files, models, records
            from nbhelpers import mask_statistics as statistics
            from nbhelpers.registry import unknown

            if f".{suffix}" not in mask_files.SUFFIXES:
                raise LookupError(unknown("format of a mask file", suffix, [one[1:] for one in mask_files.SUFFIXES]))
            folder = records.check_output_folder(out, resume=True)
            loaded = models.load_model(model, device=device)
            levels, scored_on = _scored(loaded, importance, sparsity, options, data, rows, seed, accept_low_coverage)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"masks.{suffix}"
            more = {"scored_on": scored_on} if scored_on else {}
            files = models.files_fingerprint(model)
            more |= {} if files is None else {"model_files": records.sha256_json(files)}
            sha256 = mask_files.save(
                path,
                levels,
                importance=importance,
                seed=seed,
                model_fingerprint=models.fingerprint(loaded.model),
                model=model,
                **more,
            )
            counted = statistics.counts_of_levels(levels)
            records.write_json(folder / "statistics.json", counted)
            found = [{name: one[name] for name in ("asked", "sparsity", "gone")} for one in counted]
            return {
                "layers": counted[0]["layers"],
                "denominator": counted[0]["denominator"],
                "levels": found,
                "sha256": sha256,
                "file": str(path),
            }

        carry_out(work, show_created, json)

    return command


def _scored(loaded, importance: str, sparsities, options: dict, data, rows: int, seed: int, low: bool):
    """(levels, what they were scored on)."""
    from nbhelpers import calibration, masks, models
    from nbhelpers import importance as scoring

    if importance == "magnitude":
        weights = masks.weights(loaded.model, low)
        return masks.create(loaded.model, weights, sparsities, absolute=True, accept_low_coverage=low, **options), None
    told, texts = None, None
    if scoring.needs_data(importance):
        if data is None:
            raise ValueError(f"importance {importance!r} looks at data: name a text or task with --data")
        window = min(512, models.max_positions(loaded.model) or 512)
        found = calibration.calibration(loaded.tokenizer, data, number=rows, window=window, seed=seed)
        texts, told = found.rows, found.as_dict()
    scores = scoring.scores(loaded.model, importance, texts, seed=seed, accept_low_coverage=low)
    return masks.create(loaded.model, dict(scores), sparsities, accept_low_coverage=low, **options), told


def show_created(found: dict[str, Any]) -> str:
    lines = [f"{one['asked']:g}: {one['gone']:,} weights go ({one['sparsity']:.4%})" for one in found["levels"]]
    return "\n".join([f"of {found['denominator']}", *lines, f"sha256 {found['sha256']}", f"file   {found['file']}"])


def masks_verify() -> Callable:
    def command(
        place: Place,
        model: Annotated[str | None, typer.Option(help="also: are its masked weights zero?")] = None,
        sparsity: Which = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import mask_files, masks, models
            from nbhelpers import mask_statistics as statistics

            if model is None and sparsity is not None:
                raise ValueError(f"sparsity says which masks a model is held to: name it with --model, got {sparsity}")
            own = None if model is None else models.load_model(model, device="cpu").model
            file = mask_files.load(_file(place), own, same_weights=False)
            if model is None:
                counted = statistics.counts_of_levels(file.levels)
                return {
                    "layers": counted[0]["layers"],
                    "sparsity": [one["sparsity"] for one in counted],
                    "violations": None,
                    "sha256": file.sha256,
                }
            found = masks.verify(own, file.levels.lazily(sparsity))
            broken = [name for name, one in found["per_layer"].items() if one["violations"]]
            result = {name: found[name] for name in ("layers", "sparsity", "violations", "per_layer")}
            result |= {"sha256": file.sha256, "broken": broken}
            if not found["ok"]:
                raise Violated(result)
            return result

        carry_out(work, show_verified, json)

    return command


def show_verified(found: dict[str, Any]) -> str:
    if found["violations"] is None:
        shares = ", ".join(f"{one:.4g}" for one in found["sparsity"])
        return f"the file is whole: {found['layers']} layers, sparsity {shares}, sha256 {found['sha256']}"
    lines = [
        f"FAILED {name}: {found['per_layer'][name]['violations']:,} of {found['per_layer'][name]['masked']:,} masked "
        "weights are not zero"
        for name in found["broken"]
    ]
    head = "FAILED" if found["broken"] else "OK    "
    return "\n".join(
        [
            f"{head} {found['violations']:,} violations in {found['layers']} layers, sparsity {found['sparsity']:.4g}",
            *lines,
        ]
    )


def masks_stats() -> Callable:
    def command(place: Place, json: Json = False) -> None:
        def work() -> dict:
            from nbhelpers import mask_files
            from nbhelpers import mask_statistics as statistics

            file = mask_files.load(_file(place))
            levels = statistics.counts_of_levels(file.levels)
            header = {name: value for name, value in file.header.items() if name != "shapes"}
            return {"header": header, "levels": levels, "histograms": [statistics.histogram(one) for one in levels]}

        carry_out(work, show_stats, json)

    return command


def show_stats(found: dict[str, Any]) -> str:
    """How the masks were made, a line a level, then the projections of the last one."""
    header, levels = found["header"], found["levels"]
    how = ", ".join(f"{name} {value}" for name, value in header["how"].items())
    lines = [f"importance {header['importance']}, {how}, seed {header['seed']}, of {levels[0]['denominator']}"]
    lines += [f"{one['asked']:<8g} {one['gone']:>14,} gone  {one['sparsity']:.4%}" for one in levels]
    lines += ["", f"per projection at {levels[-1]['asked']:g}:"]
    return "\n".join([*lines, *(f"  {one['sparsity']:7.2%}  {name}" for name, one in levels[-1]["per_layer"].items())])


def masks_overlap() -> Callable:
    def command(
        one: Place,
        other: Annotated[Path, typer.Argument(metavar="OTHER", help="the masks beside them")],
        sparsity: Which = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import mask_files
            from nbhelpers import mask_statistics as statistics

            first, second = (mask_files.load(_file(place)).levels.lazily(sparsity) for place in (one, other))
            return statistics.overlap(first, second)

        carry_out(work, show_overlap, json)

    return command


def show_overlap(found: dict[str, Any]) -> str:
    return (
        f"both keep {found['share']:.2%} of {found['numbers']:,} weights ({found['by_chance']:.2%} by chance), "
        f"Jaccard {found['jaccard']:.4f}"
    )


def masks_apply() -> Callable:
    def command(
        place: Place,
        model: Model,
        out: Annotated[Path, typer.Option(help="folder for the masked model")],
        sparsity: Which = None,
        any_weights: Annotated[bool, typer.Option("--any-weights", help="also on other weights of its shape")] = False,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import mask_sets, masks, models, records

            folder = records.check_output_folder(out)
            loaded = models.load_model(model, device="cpu", dtype="stored")
            file = mask_sets.load_for(_file(place), model, loaded.model, any_weights=any_weights)
            mask = file.levels.lazily(sparsity)
            masks.apply(loaded.model, mask)
            models.save_model(loaded.model, loaded.tokenizer, folder)
            again = models.load_model(str(folder), device="cpu", dtype="stored").model
            found = masks.verify(again, mask)
            result = {name: found[name] for name in ("layers", "sparsity", "violations")} | {"model": str(folder)}
            if not found["ok"]:
                broken = [name for name, one in found["per_layer"].items() if one["violations"]]
                raise Violated(result | {"broken": broken})
            return result

        carry_out(work, show_applied, json)

    return command


def show_applied(found: dict[str, Any]) -> str:
    return (
        f"{found['model']}: sparsity {found['sparsity']:.4g} in {found['layers']} layers, {found['violations']} "
        "violations after loading it again; zeros alone make nothing faster"
    )


def _file(place: Path) -> Path:
    """The mask file in a folder, or the file itself. LookupError where there is none or more than one."""
    from nbhelpers.mask_files import SUFFIXES

    if not place.is_dir():
        if not place.exists():
            raise LookupError(f"mask file '{place}' does not exist")
        return place
    found = [path for suffix in SUFFIXES if (path := place / f"masks{suffix}").is_file()]
    if len(found) != 1:
        raise LookupError(f"'{place}' holds {len(found)} mask files (masks.safetensors, .pt, .npz): name one file")
    return found[0]
