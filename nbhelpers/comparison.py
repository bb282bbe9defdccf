"""Can specialisation beat size? Large models as they are against small ones fine-tuned, on the same dialogues.

`Comparison.run(config)` leaves a run directory: phase 1 asks the large models one after another, phase 2 asks the small
ones, tunes them and asks again; memory is given back in between. What was answered before by the same weights to the
same prompts is not asked again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers import (
    adapters,
    baselines,
    break_even,
    budget,
    comparison_answers,
    comparison_data,
    comparison_pace,
    comparison_results,
    estimates,
    kept_answers,
    memory,
    merging,
    model_card,
    models,
    predictions,
    records,
    runtime,
    verdicts,
)
from nbhelpers.comparison_answers import Answers, Asking, Tuning
from nbhelpers.comparison_config import ComparisonConfig, ModelInstanceConfig, seconds_of
from nbhelpers.comparison_data import ComparisonData
from nbhelpers.dialogues import Dialogue
from nbhelpers.errors import one_line
from nbhelpers.prompts import FILE as PROMPT
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker, Interrupted

RESULTS, MERGED, BUDGET = "results.json", "merged", "budget.json"
INTERIM_EVERY = 25  # answers between two interim verdicts


class Comparison:
    """One comparison at work: its data, what each model answered, and who is told."""

    def __init__(self, on: ComparisonData, tracker: ExperimentTracker, progress, should_stop) -> None:
        self.on, self.config = on, on.config
        self.tracker, self.progress, self.should_stop = tracker, progress, should_stop
        self.answers: dict[str, Answers] = {}
        self.phases: list[dict[str, Any]] = []
        self.curve: dict[str, Any] | None = None
        self.chosen: dict[str, Any] | None = None
        self._so_far: dict[str, dict[int, bool]] = {}  # of each state: test document -> right

    @staticmethod
    def run(
        config: ComparisonConfig,
        *,
        root: str | Path = "runs",
        run_dir: str | Path | None = None,
        resume: bool = False,
        command: list[str] | None = None,
        progress: Callable[[dict], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Run `config` and leave a run directory with results.json and a folder a model; returns its result.

        resume: go on in `run_dir` where it was killed or stopped. Raises LookupError or ValueError for what cannot be
        run before a run directory exists: before any weights are read, but for a budget that is too short, which is
        known once rates were measured. Raises tracking.Interrupted after should_stop.
        """
        runtime.check_supported()
        on = comparison_data.prepared(config)
        record = ExperimentConfig(kind="comparison", **config.model_dump())
        tracker = ExperimentTracker(record, root, run_dir=run_dir, resume=resume, command=command)
        made = Comparison(on, tracker, progress, should_stop)
        if config.budget is not None:
            records.check_output_folder(tracker.run_dir, resume)  # before minutes of measuring
            made._choose_within_budget()
        with tracker:
            tracker.set_fingerprints(
                data=on.data.sha256,
                split=records.sha256_json(records.plain(on.split.record)),
                labels=records.sha256_json(on.data.labels),
            )
            made._carry_out()
            result = comparison_results.result(on, made.answers, made.phases, made.curve, made.chosen)
            result["run_dir"] = str(tracker.run_dir)
            result["licences"] = comparison_data.licences(config)
            made._merge_the_best(result)
            records.write_json(tracker.run_dir / RESULTS, records.plain(result["models"]))
            made._write_cards(result)  # a finished run cannot be resumed for what it lacks
            tracker.finish(result)
        return result

    # phases -------------------------------------------------------------------------------------------------------

    def _carry_out(self) -> None:
        config = self.config
        if self.chosen is not None:
            self._keep_to_budget()
        self._fit_baselines()
        if config.experiment != "training":
            self.run_llm_evaluation()
        if config.experiment != "baseline":
            self.run_slm_finetuning()
            if config.break_even_points and config.experiment == "full":  # it is about getting ahead of a large model
                self._break_even()

    def _fit_baselines(self) -> None:
        for name in self.config.baselines:
            key, started = f"BASELINE_{name}", time.perf_counter()
            self._tell("baseline", key=key)
            lines, scores, info = {}, {}, {}
            for part, rows in (("test", self.on.test), ("validation", self.on.validation)):
                if not rows:
                    continue
                lines[part], scores[part], info = baselines.answers(
                    name, self.on.train, self.on.validation, rows, self.on.data.labels, self.config.seed
                )
            for line in (line for part in lines.values() for line in part):
                line["written"] = line["ranked"][0]  # what it would write
            self._keep(key, Answers(lines, scores, {"info": info}), started, "baselines")

    def run_llm_evaluation(self) -> None:
        """Phase 1: each large model as it is; by option tuned too."""
        for model in self.config.llm_models:
            self._state(model, "LLM", "untrained", "llm_evaluation", validation=self.config.ensemble)
        for model in self.config.llm_models if self.config.fine_tune_llms else ():
            self._state(model, "LLM", "finetuned", "llm_finetuning", tuned=self.on.train, validation=True)

    def run_slm_finetuning(self) -> None:
        """Phase 2: each small model as it is, then tuned and asked again (run_slm_evaluation)."""
        for model in self.config.slm_models:
            self._state(model, "SLM", "zero_shot", "slm_zero_shot")
        self.run_slm_evaluation()

    def run_slm_evaluation(self) -> None:
        """Each small model tuned, and asked; what is tuned already is only asked."""
        for model in self.config.slm_models:
            self._state(model, "SLM", "finetuned", "slm_finetuning", tuned=self.on.train, validation=True)

    def _state(
        self,
        model: ModelInstanceConfig,
        side: str,
        status: str,
        phase: str,
        *,
        tuned: Sequence[Dialogue] | None = None,
        validation: bool = False,
    ) -> None:
        key, started = f"{side}_{model.short}_{status}", time.perf_counter()
        asking = Asking(
            key=key,
            model=model,
            prompts=self.on.prompts(model),
            parts={"test": self.on.test} | ({"validation": self.on.validation} if validation else {}),
            kinds=self.on.kinds,
            tuning=None if tuned is None else self._tuning(model, tuned),
            latency=self.config.latency_requests,
        )
        answers = comparison_answers.obtain(asking, self.config, self.tracker, self._hear, self.should_stop)
        answers.about |= {"model": model.model_dump(), "estimated": self._estimated(asking)}
        self._keep(key, answers, started, phase)

    def _tuning(self, model: ModelInstanceConfig, rows: Sequence[Dialogue], keep: bool = True) -> Tuning:
        settings = self.config.training(model, sum(len(row.labels) for row in rows), self.on.epochs)
        return Tuning(rows, self.on.validation, settings, keep=keep)

    def _estimated(self, asking: Asking) -> dict[str, int]:
        """Bytes that the sum of estimates.py gives for this state's heaviest job."""
        model, rows, rank = models.load_config(asking.model.name), 1, asking.model.lora_rank or self.config.lora_rank
        job = f"inference_{asking.model.quantization or '16bit'}"
        if asking.tuning is not None:
            how = asking.tuning.config
            job = {"full": "full_finetuning"}.get(how.method, how.method)
            rows = how.micro_batch_size or how.batch_size
        wide = (self.config.device or runtime.device()) == "cpu"
        tokens, size = rows * asking.prompts.window, 4 if wide else 2
        need = estimates.required_bytes(model, job, tokens=tokens, rank=rank, weight_bytes=size)
        return {"bytes": need.total, "job": job}

    def _keep(self, key: str, answers: Answers, started: float, phase: str) -> None:
        """Put a state's answers on record: predictions beside, its phase, what it got right so far."""
        self.answers[key] = answers
        for part, lines in answers.lines.items():
            name = predictions.FILE if part == "test" else f"predictions.{part}.jsonl"
            folder = self.tracker.run_dir / "models" / key
            folder.mkdir(parents=True, exist_ok=True)
            records.write_atomic(folder / name, predictions.as_lines(lines))
        self._phase(phase, key, answers, started)
        right = self._right(key)
        self._tell("answered", key=key, right=sum(right), total=len(right), came=answers.came)

    def _phase(self, name: str, key: str, answers: Answers, started: float) -> None:
        about = answers.about
        self.phases.append(
            {
                "name": name,
                "model": key,
                "seconds": time.perf_counter() - started,
                "came": answers.came,
                "memory": about.get("memory"),
                "estimated": about.get("estimated"),
                "estimated_seconds": self._expected(key),
            }
        )

    def _expected(self, key: str) -> float | None:
        """Seconds of a model state at the rates that a budget was chosen by; None without a budget."""
        side, status = key.rpartition("_")[0].removesuffix("_zero"), key.rpartition("_")[2]
        rates = self.chosen["rates"] if self.chosen else {"answer_seconds": {}}
        if side not in rates["answer_seconds"]:
            return None
        states = 2 if side in rates["training_seconds"] else 1
        seconds = (rates["load_seconds"][side] + len(self.on.test) * rates["answer_seconds"][side]) / states
        if status == "finetuned":
            seconds += len(self.on.train) * self.on.epochs * rates["training_seconds"][side]
        return seconds

    def _merge_the_best(self, result: dict[str, Any]) -> None:
        """The best small model as a whole one, where this run has tuned it in 4 bits and so keeps adapters of it.

        Where memory or disk ends the adapters stand alone, and the result says so.
        """
        tuned = {key: self._right(key) for key in self.answers if key.startswith("SLM_") and key.endswith("_finetuned")}
        best = verdicts.best(tuned) if tuned else ""
        folder = self.tracker.run_dir / "models" / best
        if not (folder / "model" / adapters.CONFIG).is_file():
            return
        self._tell("merging", key=best)
        shutil.rmtree(folder / MERGED, ignore_errors=True)  # of an attempt that was killed
        try:
            found = merging.merge(folder / "model", folder / MERGED, device=self.config.device)
            shutil.copy(folder / "model" / PROMPT, folder / MERGED)
        except Exception as error:
            if not memory.is_oom(error) and not isinstance(error, OSError):
                raise
            found = {"error": one_line(error)}
            self.tracker.event("merging_failed", **found)
        else:
            result["facts"] += [fact | {"model": best} for fact in found.pop("facts")]
            result["all_facts_hold"] = all(fact["ok"] for fact in result["facts"])
        result["merged"] = {"key": best} | found
        right = tuned[best]
        self._tell("answered", key=best, right=sum(right), total=len(right), came=self.answers[best].came)

    def _write_cards(self, result: Mapping[str, Any]) -> None:
        """A model card beside each tuned model that this run has made."""
        manifest = records.read_json(self.tracker.run_dir / "manifest.json")
        for side, members in self.config.sides.items():
            for model in members:
                key = f"{side}_{model.short}_finetuned"
                for name in ("model", MERGED):
                    folder = self.tracker.run_dir / "models" / key / name
                    if key in result["models"] and folder.is_dir():
                        prompts = self.on.prompts(model)
                        written = prompts.text(model_card.DIALOGUE)
                        how = {"new_tokens": prompts.room, "special_tokens": not prompts.chat, "end": prompts.end}
                        model_card.write(result, manifest, key, folder, prompt=written, **how)

    # break-even ---------------------------------------------------------------------------------------------------

    def _break_even(self) -> None:
        """The best small model tuned on fewer dialogues: chosen by validation, so that the test stays unseen."""
        model = max(self.config.slm_models, key=self._validated)
        whole, labels = len(self.on.train), [row.labels[0] for row in self.on.train]
        smaller = break_even.sizes(whole, self.config.break_even_points + 2)[1:-1]
        points = [(0, self._right(f"SLM_{model.short}_zero_shot"))]
        for size, chosen in zip(smaller, break_even.subsets(labels, smaller, self.config.seed), strict=True):
            started = time.perf_counter()
            asking = Asking(
                key=f"SLM_{model.short}_on_{size}",
                model=model,
                prompts=self.on.prompts(model),
                parts={"test": self.on.test},
                kinds=self.on.kinds[:1],
                tuning=self._tuning(model, [self.on.train[at] for at in chosen], keep=False),
            )
            answers = comparison_answers.obtain(asking, self.config, self.tracker, self._hear, self.should_stop)
            right = comparison_results.right(answers, self.on.config.headline)
            points.append((size, right))
            self._tell("answered", key=asking.key, right=sum(right), total=len(right), came=answers.came)
            self._phase("break_even", asking.key, answers, started)
        key = f"SLM_{model.short}_finetuned"
        self.curve = {"model": model.name, "key": key, "points": [*points, (whole, self._right(key))]}

    def _right(self, key: str, part: str = "test") -> list[bool]:
        return comparison_results.right(self.answers[key], self.on.config.headline, part)

    def _validated(self, model: ModelInstanceConfig) -> float:
        right = self._right(f"SLM_{model.short}_finetuned", "validation")
        return sum(right) / len(right)

    # a budget -----------------------------------------------------------------------------------------------------

    def _choose_within_budget(self) -> None:
        """Measure rates on a few rows and steps of each model, then choose rows and epochs that fit; on resume the
        choice stands. ValueError, and nothing is written, where none fits."""
        kept, before = self.tracker.run_dir / BUDGET, self._budget_before()
        if kept.exists() or (self.config.cache and before.exists()):
            self.chosen = records.read_json(kept if kept.exists() else before)
        else:
            rates = comparison_pace.rates(self.on, self._tell, self.should_stop)
            wanted = budget.Wanted(len(self.on.test), len(self.on.train) * self.on.tunes, self.config.epochs)
            choice = budget.choose(seconds_of(self.config.budget), rates, wanted, self.config.pairs)
            self.chosen = vars(choice) | {"rates": vars(rates)}

    def _keep_to_budget(self) -> None:
        """Take as many rows and epochs as were chosen, and write the choice down."""
        before = self._budget_before()
        before.parent.mkdir(exist_ok=True)
        for place in (self.tracker.run_dir / BUDGET, before):
            records.write_json(place, records.plain(self.chosen))
        self.on.reduce(*(self.chosen[name] for name in ("test_rows", "training_rows", "epochs")))
        self.tracker.event("budget", **{name: value for name, value in self.chosen.items() if name != "rates"})
        self._tell("budget", says=self.chosen["text"])

    def _budget_before(self) -> Path:
        """Where this choice is kept for the runs beside this one that ask the same on the same device."""
        asked = self.config.model_dump(exclude={"name", "cache", "cache_days", "keep_text"})
        device = runtime.device_name(self.config.device or runtime.device())
        key = records.sha256_json(records.plain([asked, self.on.data.sha256, self.on.data.labels, device]))
        return kept_answers.folder(self.tracker.run_dir) / f"{kept_answers.PREFIX}budget-{key}.json"

    # who is told --------------------------------------------------------------------------------------------------

    def _hear(self, now: dict) -> None:
        """Pass on what one model's asking tells, with an interim verdict now and then."""
        if now["stage"] == "answering":
            now = dict(now)
            lines = self._so_far.setdefault(now["key"], {})
            line, number = now.pop("line"), now.pop("number")
            if now["part"] == "test" and number not in lines:
                lines[number] = comparison_results.is_right(line, self.on.config.headline)
                if len(lines) % INTERIM_EVERY == 0:
                    now["interim"] = self._interim(now["key"], lines)
            now |= {"right": sum(lines.values()), "asked": len(lines)}
        self._tell(**now)

    def _interim(self, key: str, lines: Mapping[int, bool]) -> str | None:
        """The verdict on what a tuned small model has answered so far; None where there is nothing to compare."""
        large = [name for name in self.answers if name.startswith("LLM_") and name.endswith("_untrained")]
        if not large or not key.startswith("SLM_") or not key.endswith("_finetuned"):
            return None
        numbers = sorted(lines)
        found = verdicts.interim(
            {name: [right[at] for at in numbers] for name, right in zip(large, map(self._right, large), strict=True)},
            {key: [lines[at] for at in numbers]},
            asked=len(self.on.test),
            measure=self.on.config.headline,
        )
        return None if found["waiting"] else found["sentence"]

    def _tell(self, stage: str, **what: Any) -> None:
        if self.should_stop is not None and stage in ("baseline", "loading") and self.should_stop():
            raise Interrupted(f"stopped before {what.get('key', stage)}")
        if self.progress is not None:
            self.progress({"stage": stage, **what})
