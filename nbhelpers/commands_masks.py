"""What do the commands of `nbhelpers masks` do? Create, verify, stats, overlap and apply of weight masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nbhelpers.commands import Json, Violation, carry_out
from nbhelpers.registry import unknown

WINDOW = 512  # tokens of a row that weights are scored on
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
        sparsity: Annotated[
            list[float],
            typer.Option(help="share that goes, 0-1, of weights, or of rows, columns or channels; may be repeated"),
        ],
        pattern: Annotated[str, typer.Option(help="unstructured, structured or nm")] = "unstructured",
        importance: Annotated[str, typer.Option(help="random, magnitude, gradient, taylor, wanda, ...")] = "magnitude",
        scope: Annotated[str | None, typer.Option(help="layer, row or global; None = the pattern's first")] = None,
        dimension: Annotated[
            str | None, typer.Option(help="structured: outputs, inputs or channels; None = outputs")
        ] = None,
        group: Annotated[int | None, typer.Option(help="nm: M, of which sparsity leaves N out; None = 4")] = None,
        data: Annotated[str | None, typer.Option(help="text or task to score on, where that is needed")] = None,
        rows: Annotated[int | None, typer.Option(help="rows of it; None = 128")] = None,
        window: Annotated[
            int | None, typer.Option(help="tokens of a row; None = 512, or the model's positions", min=2)
        ] = None,
        seed: Annotated[int | None, typer.Option(help="seed of random scores and of the rows drawn; None = 0")] = None,
        suffix: Annotated[str, typer.Option("--format", help="safetensors, pt or npz")] = "safetensors",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="in place of other masks in --out")] = False,
        accept_low_coverage: Annotated[bool, typer.Option(help="also where not all projections are reached")] = False,
        device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; None = what is found")] = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import mask_files, masks, models, records

            if f".{suffix}" not in mask_files.SUFFIXES:
                raise LookupError(unknown("format of a mask file", suffix, [one[1:] for one in mask_files.SUFFIXES]))
            how = masks.how(pattern, scope, dimension, group)
            _refuse_idle(importance, data=data, rows=rows, window=window, seed=seed)
            path = records.check_output_folder(out, resume=True) / f"masks.{suffix}"
            texts, scored_on = _rows(model, importance, data, rows, window, seed or 0)
            said = {
                "model": model,
                "importance": importance,
                "seed": seed or 0,
                "sparsities": list(map(float, masks.ascending(sparsity))),
                "how": how,
                **({"scored_on": scored_on} if scored_on else {}),
                **_made_of(model),  # of a hub id too: its config was read by now
            }
            there = None if overwrite else _there(path, records.plain(said))
            if there is not None:
                return _told(path, there, "cached")
            loaded = models.load_model(model, device=device)
            said |= _made_of(model)
            levels = _scored(loaded.model, said, texts, accept_low_coverage)
            path.parent.mkdir(parents=True, exist_ok=True)
            header = {name: value for name, value in said.items() if name not in ("sparsities", "how")}
            mask_files.save(path, levels, model_fingerprint=models.fingerprint(loaded.model), **header)
            for other in _in(path.parent):
                if other != path:
                    other.unlink()
            return _told(path, mask_files.load(path), "measured")

        carry_out(work, show_created, json)

    return command


def _made_of(model: str) -> dict[str, str]:
    """What a header says of the model's files, so that masks fit them in any number format; nothing where not known."""
    from nbhelpers import models, records

    files = models.revision(model)
    return {"model_files": records.sha256_json(files)} if files else {}


def _refuse_idle(importance: str, **given: Any) -> None:
    """ValueError for options that decide nothing with this importance; LookupError for an unknown one."""
    from nbhelpers.importance import needs_data

    if needs_data(importance):
        return
    idle = [f"--{name}" for name, value in given.items() if value is not None and name != "seed"]
    if idle:
        raise ValueError(f"importance {importance!r} looks at no data: leave out {', '.join(idle)}")
    if importance != "random" and given["seed"] is not None:
        raise ValueError(f"importance {importance!r} draws nothing: leave out --seed")


def _rows(model: str, importance: str, data: str | None, rows: int | None, window: int | None, seed: int):
    """(rows to score on, what they are), (None, None) for an importance that looks at none; no weights are loaded."""
    from nbhelpers import calibration, models, stages
    from nbhelpers.importance import needs_data

    config = models.load_config(model)
    if not needs_data(importance):
        return None, None
    if data is None:
        raise ValueError(f"importance {importance!r} looks at data: name a text or task with --data")
    window = stages.check_window(window, config, default=WINDOW)
    number = 128 if rows is None else rows
    found = calibration.calibration(models.load_tokenizer(model), data, number=number, window=window, seed=seed)
    return found.rows, found.as_dict()


def _scored(model, said: dict[str, Any], texts, low: bool):
    from nbhelpers import importance, masks

    own = said["importance"] == "magnitude"
    if own:
        scores = masks.weights(model, low)
    else:
        scores = dict(importance.scores(model, said["importance"], texts, seed=said["seed"], accept_low_coverage=low))
    return masks.create(model, scores, said["sparsities"], absolute=own, accept_low_coverage=low, **said["how"])


def _in(folder: Path) -> list[Path]:
    from nbhelpers.mask_files import SUFFIXES

    return [path for suffix in SUFFIXES if (path := folder / f"masks{suffix}").is_file()]


def _there(path: Path, said: dict[str, Any]):
    """The masks that are there already, of this model and these settings; None where there are none. ValueError for
    any others."""
    from nbhelpers import mask_files

    way_out = "choose another --out, or --overwrite"
    found = _in(path.parent)
    if others := [other.name for other in found if other != path]:
        raise ValueError(
            f"'{path.parent}' holds {', '.join(others)}, and a second file beside it would leave open which one is "
            f"meant: {way_out}"
        )
    if not found:
        return None
    try:
        there = mask_files.load(path)
    except ValueError as error:
        raise ValueError(f"{error} with --overwrite") from error
    if differs := _differences(there.header, said):
        raise ValueError(f"'{path}' holds other masks ({'; '.join(differs)}): {way_out}")
    return there


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What of these two headers decides a mask and is not the same, in words."""
    found = []
    names = there.get("model"), asked["model"]
    files = there.get("model_files"), asked.get("model_files")
    compared = files if all(files) else names
    if compared[0] != compared[1]:
        found.append(f"model {names[0]}" + (f", asked {names[1]}" if names[0] != names[1] else " with other files"))
    one, other = (
        {
            **{name: header[name] for name in ("importance", "seed")},
            "sparsities": ", ".join(map(str, header["sparsities"])),
            **header["how"],
            **{f"data {name}": (header.get("scored_on") or {}).get(name) for name in ("source", "rows", "window")},
        }
        for header in (there, asked)
    )
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            found.append(f"{name} {one.get(name)}, asked {other.get(name)}")
    texts = [(header.get("scored_on") or {}).get("fingerprint") for header in (there, asked)]
    return found or (["the text itself"] if texts[0] != texts[1] else [])


def _told(path: Path, file, came: str) -> dict[str, Any]:
    """What was made, or was there: counted on the file, and written beside it."""
    from nbhelpers import mask_statistics as statistics
    from nbhelpers import records
    from nbhelpers.mask_patterns import share_of

    counted = statistics.counts_of_levels(file.levels)
    records.write_json(path.parent / "statistics.json", counted)
    return {
        "layers": counted[0]["layers"],
        "denominator": counted[0]["denominator"],
        "asked_of": share_of(file.levels.how),
        "levels": [{name: one[name] for name in ("asked", "sparsity", "gone")} for one in counted],
        "sha256": file.sha256,
        "file": str(path),
        "came": came,
    }


def show_created(found: dict[str, Any]) -> str:
    lines = ["these masks are there already"] if found["came"] == "cached" else []
    lines += [
        f"{one['asked']:g} of {found['asked_of']}: {one['gone']:,} weights go ({one['sparsity']:.4%} of "
        f"{found['denominator']})"
        for one in found["levels"]
    ]
    return "\n".join([*lines, f"sha256 {found['sha256']}", f"file   {found['file']}"])


def masks_verify() -> Callable:
    def command(
        place: Place,
        model: Annotated[str | None, typer.Option(help="also: are its masked weights zero?")] = None,
        sparsity: Which = None,
        json: Json = False,
    ) -> None:
        def work() -> dict:
            from nbhelpers import mask_choice, mask_files, masks, models
            from nbhelpers import mask_statistics as statistics

            if model is None and sparsity is not None:
                raise ValueError(f"sparsity says which masks a model is held to: name it with --model, got {sparsity}")
            if model is not None:
                mask_choice.level_in(place, sparsity)
            own = None if model is None else models.load_model(model, device="cpu").model
            file = mask_files.load(mask_choice.file_in(place), own, same_weights=False)
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
            from nbhelpers import mask_choice, mask_files
            from nbhelpers import mask_statistics as statistics

            file = mask_files.load(mask_choice.file_in(place))
            levels = statistics.counts_of_levels(file.levels)
            header = {name: value for name, value in file.header.items() if name != "shapes"}
            return {"header": header, "levels": levels, "histograms": [statistics.histogram(one) for one in levels]}

        carry_out(work, show_stats, json)

    return command


def show_stats(found: dict[str, Any]) -> str:
    """How the masks were made, a line a level, then the projections of the last one."""
    from nbhelpers.mask_patterns import share_of

    header, levels = found["header"], found["levels"]
    how = ", ".join(f"{name} {value}" for name, value in header["how"].items())
    lines = [f"importance {header['importance']}, {how}, seed {header['seed']}"]
    lines += [f"asked of {share_of(header['how'])}, counted of {levels[0]['denominator']}"]
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
            from nbhelpers import mask_choice, mask_files
            from nbhelpers import mask_statistics as statistics

            for place in (one, other):
                mask_choice.level_in(place, sparsity)
            files = [mask_files.load(mask_choice.file_in(place)) for place in (one, other)]
            return statistics.overlap(*(file.levels.lazily(sparsity) for file in files))

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
            from nbhelpers import mask_choice, mask_sets, masks, models, records

            folder = records.check_output_folder(out)
            mask_choice.level_in(place, sparsity)
            loaded = models.load_model(model, device="cpu", dtype="stored")
            file = mask_sets.load_for(mask_choice.file_in(place), model, loaded.model, any_weights=any_weights)
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
