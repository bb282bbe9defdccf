"""Does everything work on this machine? The bundled models, gates, training, saving, records, figures, the device.

A run like every other one: config in, run directory out, each check a fact with what it saw. It needs no network.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import Field, field_validator

from nbhelpers import attention, data, evaluate, facts, generated, memory, models, plots, records, runtime, training
from nbhelpers.architecture import geometry
from nbhelpers.errors import one_line
from nbhelpers.facts import Fact
from nbhelpers.registry import unknown
from nbhelpers.stats import digits
from nbhelpers.strict import StrictConfig
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker, Interrupted

ALL = "all"
KIND = "self_check"
DOCUMENTS = 100  # of the held-out text: enough for the windows that the manifest's numbers rest on
NLL_TOLERANCE = 1e-3  # nats a token between this machine and the one that made the models
FEW_ROWS, SHORT, STEPS = 2, 64, 6
FREE_BYTES = 10**9  # of disk and of memory, what the default notebooks need with room to spare
QUANTIZED_LOSS = 0.2  # nats a token that 4 bits may cost a tiny model
PNG = b"\x89PNG\r\n\x1a\n"


class SelfCheckConfig(StrictConfig):
    """What is checked. Refuses unknown names before anything is loaded."""

    name: str = Field("self-check", min_length=1, description="what the run is called in its record")
    models: str = Field(ALL, description="bundled models to check: names with commas between them, or all")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the training steps and of the numbers multiplied")

    @field_validator("models")
    @classmethod
    def _known_models(cls, value: str) -> str:
        known = models.bundled_names()
        for name in value.split(","):
            if value != ALL and name.strip() not in known:
                raise ValueError(unknown("bundled model", name.strip(), [ALL, *known]))
        return value

    def names(self) -> list[str]:
        """The models that are meant, each once."""
        if self.models == ALL:
            return models.bundled_names()
        return sorted({name.strip() for name in self.models.split(",")})


@dataclass
class Bench:
    """What the checks share: the models, each loaded once, a few rows of text for each, and a scratch folder."""

    names: list[str]
    made: dict[str, dict]  # the manifest's entries
    scratch: Path
    seed: int
    device: str
    loaded: dict[str, models.LoadedModel] = field(default_factory=dict)
    cut: dict[tuple[str, int], list[dict]] = field(default_factory=dict)

    @property
    def small(self) -> str:
        """The model that is trained and saved."""
        return min(self.names, key=lambda name: (self.made[name]["parameters"], name))

    def model(self, name: str) -> torch.nn.Module:
        if name not in self.loaded:
            self.loaded[name] = models.load_model(name, device=self.device, dtype="float32")
        return self.loaded[name].model

    def rows(self, name: str, window: int) -> list[dict]:
        """Held-out text in windows of this many tokens of this model."""
        self.model(name)
        if (name, window) not in self.cut:
            texts = generated.documents(DOCUMENTS, generated.HELD_OUT_SEED)
            documents = [data.Document(text) for text in texts]
            self.cut[name, window] = data.rows(self.loaded[name].tokenizer, documents, window)
        return self.cut[name, window]

    def few(self, name: str) -> list[dict]:
        return self.rows(name, SHORT)[:FEW_ROWS]


def run_selfcheck(
    config: SelfCheckConfig | None = None,
    *,
    root: str | Path = "runs",
    run_dir: str | Path | None = None,
    command: list[str] | None = None,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict:
    """Check this machine and leave a run directory; returns its result. A check that raises is a fact that failed.

    tracking.Interrupted after should_stop, which is asked between the checks.
    """
    config, started = config or SelfCheckConfig(), time.monotonic()
    runtime.check_supported()
    record = ExperimentConfig(kind=KIND, **config.model_dump())
    manifest = models.BUNDLED.parent / "manifest.json"
    with ExperimentTracker(record, root, run_dir=run_dir, command=command) as tracker:
        tracker.set_fingerprints(manifest=records.sha256_file(manifest))
        with TemporaryDirectory(dir=tracker.run_dir, prefix=".scratch-") as scratch, _no_progress_bars():
            made = records.read_json(manifest)["models"]
            bench = Bench(config.names(), made, Path(scratch), config.seed, runtime.device())
            found = []
            for number, (says, check) in enumerate(CHECKS.items()):
                if should_stop is not None and should_stop():
                    raise Interrupted(f"stopped after {number} of {len(CHECKS)} checks")
                if progress is not None:
                    progress({"stage": f"checking: {says}", "done": number, "total": len(CHECKS)})
                fact = _checked(check, says, bench)
                tracker.event("check", name=fact.name, ok=fact.ok, saw=fact.saw)
                found.append(fact)
            memory.release(*(loaded.model for loaded in bench.loaded.values()))
        result = _result(config, found, tracker, time.monotonic() - started)
        tracker.finish(result)
    return result


def _checked(check: Callable[[Bench], tuple], says: str, bench: Bench) -> Fact:
    try:
        ok, more, saw = check(bench)
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001 - whatever does not work here is what this is to find out
        ok, more, saw = False, "", f"{type(error).__name__}: {one_line(error)}"
    return Fact(check.__name__, bool(ok), says + more, saw)


def _result(config: SelfCheckConfig, found: list[Fact], tracker: ExperimentTracker, seconds: float) -> dict:
    held = sum(fact.ok for fact in found)
    begins = "everything that was checked works here" if held == len(found) else "something does not work here"
    return {
        "kind": KIND,
        "models": config.names(),
        "verdict": f"{begins}: {held} of {len(found)} checks hold",
        "text": {"source": data.BUNDLED, "generated": True},
        "facts": [fact.as_dict() for fact in found],
        "all_facts_hold": held == len(found),
        "seconds": seconds,
        "run_dir": str(tracker.run_dir),
    }


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for each model it loads; here that is noise."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- the checks: (whether it holds, what is added to the claim, what was seen) ----------------------------------------


def files_are_as_made(bench: Bench) -> tuple:
    """sha256 of every file of every model against the manifest."""
    changed, count = [], 0
    for name in bench.names:
        for file, sha256 in bench.made[name]["files"].items():
            path = models.BUNDLED / name / file
            count += 1
            if not path.is_file() or records.sha256_file(path) != sha256:
                changed.append(f"{name}/{file}")
    return not changed, "", f"changed or missing: {', '.join(changed)}" if changed else f"{count} files, none changed"


def models_predict_as_made(bench: Bench) -> tuple:
    """The loss on the same windows of held-out text as when the manifest was written."""
    expected, found = {}, {}
    for name in bench.names:
        before = bench.made[name]["pruning"]
        rows = bench.rows(name, bench.made[name]["held_out"]["window"])[: before["windows"]]
        measured = evaluate.perplexity(bench.model(name), rows)
        if measured.tokens != before["tokens"]:
            raise ValueError(f"{name}: {measured.tokens} tokens were scored, {before['tokens']} when it was made")
        expected[name], found[name] = before["nll"], measured.nll
    far = max(abs(found[name] - expected[name]) for name in found)
    said = ", ".join(f"{name} {digits(math.exp(nll))}" for name, nll in expected.items())
    saw = ", ".join(f"{name} {digits(math.exp(nll))}" for name, nll in found.items())
    return far <= NLL_TOLERANCE, f" ({said})", f"{saw}; largest difference {far:.1e} nats a token"


def open_gates_are_transparent(bench: Bench) -> tuple:
    seen = [facts.gates_change_nothing_while_open(bench.model(name), bench.few(name)) for name in bench.names]
    far = max(fact.values["relative_difference"] for fact in seen)
    return all(fact.ok for fact in seen), "", f"largest relative difference of the logits {far:.1e}"


def closed_heads_add_nothing(bench: Bench) -> tuple:
    """The first head of every layer closed: it adds exactly 0, the others do not, and the logits change."""
    seen = []
    for name in bench.names:
        model, rows = bench.model(name), bench.few(name)
        shut = [(layer, 0) for layer in range(geometry(model.config).layers)]
        before = facts.logits(model, rows)
        with attention.heads_closed(model, shut):
            seen.append(facts.closed_heads_add_nothing(model, rows, shut, name))
            seen.append(facts.pruning_changed_the_logits(before, facts.logits(model, rows), shut))
    failed = [f"{fact.says}: {fact.saw}" for fact in seen if not fact.ok]
    return not failed, "", "; ".join(failed) or f"exactly 0 in {len(bench.names)} models"


def training_lowers_the_loss(bench: Bench) -> tuple:
    rows = bench.rows(bench.small, SHORT)[: 2 * FEW_ROWS]
    settings = training.TrainingConfig(
        steps=STEPS, learning_rate=1e-3, batch_size=len(rows), eval_every=None, keep_best=False, seed=bench.seed
    )
    with memory.loaded(lambda: models.load_model(bench.small, device=bench.device, dtype="float32").model) as model:
        before = evaluate.perplexity(model, rows).nll
        training.fine_tune(model, rows, None, settings, output_dir=bench.scratch / "training")
        after = evaluate.perplexity(model, rows).nll
    return after < before, f" ({STEPS} steps)", f"{before:.3f} to {after:.3f} nats a token, {bench.small}"


def saved_model_is_the_same(bench: Bench) -> tuple:
    """Saved with a closed head in each layer, loaded again through us and through plain transformers."""
    model, rows = bench.model(bench.small), bench.few(bench.small)
    shut = [(layer, 0) for layer in range(geometry(model.config).layers)]
    with attention.heads_closed(model, shut):
        nll = evaluate.perplexity(model, rows).nll
        folder = models.save_model(model, bench.loaded[bench.small].tokenizer, bench.scratch / "model")
    seen = facts.saved_model_is_the_same(folder, rows, nll, shut, bench.device)
    return all(fact.ok for fact in seen), "", "; ".join(fact.saw for fact in seen)


def records_survive(bench: Bench) -> tuple:
    """Somebody reads a file while it is written again and again; a line is torn in the middle."""
    values = [list(range(5000)), list(range(5000, 0, -1))]
    path, torn_reads, done = bench.scratch / "whole.json", [], threading.Event()
    records.write_json(path, values[0])

    def read() -> None:
        while not done.is_set():
            try:
                torn_reads.extend([1] * (records.read_json(path) not in values))
            except ValueError:
                torn_reads.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(20):
            records.write_json(path, values[number % 2], durable=False)
    finally:
        done.set()
        reader.join()
    lines = bench.scratch / "lines.jsonl"
    for number in range(3):
        records.append_line(lines, {"step": number})
    lines.write_bytes(lines.read_bytes()[:-4])  # a process killed in the middle of a line
    records.append_line(lines, {"step": 3})
    rows, torn = records.read_lines(lines)
    ok = not torn_reads and torn == 1 and [row["step"] for row in rows] == [0, 1, 3]
    return ok, "", f"{len(torn_reads)} torn reads in 20 writes, {torn} torn line, lines read {rows}"


def figures_can_be_drawn(bench: Bench) -> tuple:
    stages = {stage: {"perplexity": value} for stage, value in (("baseline", 2.0), ("pruned", 4.0))}
    about = {"model": bench.small, "strategy": "random", "level": 0.5, "text": {"generated": True}}
    picture = plots.png(plots.stages({**stages, **about}))
    return picture.startswith(PNG) and len(picture) > 1000, "", f"a PNG of {len(picture) / 1000:.0f} kB"


def device_multiplies_right(bench: Bench) -> tuple:
    """Products of matrices on the device against float64 on the CPU, in float32 and as models are loaded here."""
    generator, far = torch.Generator().manual_seed(bench.seed), {}
    for dtype in {torch.float32, runtime.dtype_for(bench.device)}:
        a, b = (torch.randn(256, 256, generator=generator).to(dtype) for _ in range(2))
        exact = a.double() @ b.double()
        there = product(a.to(bench.device), b.to(bench.device)).cpu().double()
        far[dtype] = ((there - exact).abs().max() / exact.abs().max()).item()
    saw = ", ".join(f"{str(dtype)[6:]} off by {value:.1e}" for dtype, value in far.items())
    return all(value <= facts.RELATIVE_TOLERANCE[dtype] for dtype, value in far.items()), "", f"{bench.device}: {saw}"


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def four_bits_work_or_it_is_said_why_not(bench: Bench) -> tuple:
    """A model in 4 bits has nearly the loss of the model itself; where it cannot be loaded, the reason."""
    name, rows = bench.small, bench.few(bench.small)
    whole = evaluate.perplexity(bench.model(name), rows).nll
    try:
        model = models.load_model(name, device=bench.device, quantization="4bit").model
    except (ValueError, RuntimeError) as error:  # no bitsandbytes, or none for this device
        return True, "", f"not available: {one_line(error)}"
    with memory.loaded(lambda: model):
        nll = evaluate.perplexity(model, rows).nll
    return abs(nll - whole) <= QUANTIZED_LOSS, "", f"{nll:.3f} nats a token in 4 bits, {whole:.3f} in 32, {name}"


def there_is_room(bench: Bench) -> tuple:
    disk, free = shutil.disk_usage(bench.scratch).free, memory.available_bytes()
    saw = f"{disk / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB of memory"
    return min(disk, free) >= FREE_BYTES, f" ({FREE_BYTES / 1e9:.1f} GB of disk and of memory)", saw


CHECKS: dict[str, Callable[[Bench], tuple]] = {
    "the files of the bundled models are those that were made": files_are_as_made,
    "the bundled models predict held-out text as when they were made": models_predict_as_made,
    "with all gates open each model is transformers' own": open_gates_are_transparent,
    "a closed head adds exactly 0, an open one does not": closed_heads_add_nothing,
    "training lowers the loss": training_lowers_the_loss,
    "a saved model, loaded again, has the same heads closed and the same loss": saved_model_is_the_same,
    "a file is never read half written, and a torn line costs only itself": records_survive,
    "figures can be drawn": figures_can_be_drawn,
    "the device multiplies as float64 does, to its precision": device_multiplies_right,
    "models load in 4 bits, or it is said why not": four_bits_work_or_it_is_said_why_not,
    "there is room to work": there_is_room,
}
