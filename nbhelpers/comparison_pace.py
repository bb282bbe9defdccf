"""How fast does each model of a comparison answer and learn here? A few rows and steps, timed; only for planning."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence

from nbhelpers import break_even, budget, label_answers, memory, models, training
from nbhelpers.comparison_answers import WARM_UP
from nbhelpers.comparison_config import ModelInstanceConfig
from nbhelpers.comparison_data import ComparisonData
from nbhelpers.tracking import Interrupted

Stop = Callable[[], bool] | None

ROWS, STEPS = 4, 2  # that are timed, after one that warms up


def rates(made: ComparisonData, tell: Callable[..., None], should_stop: Stop = None) -> budget.Rates:
    """Seconds a test row, a training row and a load of each model; validation rows and latency count as fixed."""
    config = made.config
    answering: dict[str, float] = {}
    learning: dict[str, float] = {}
    loading: dict[str, float] = {}
    fixed = 0.0
    for side, members in made.config.sides.items():
        tunes = side == "SLM" or config.fine_tune_llms
        for model in members:
            key = f"{side}_{model.short}"
            tell("measuring rates", key=key)
            loaded, row, taught = _timed(made, model, tunes, should_stop)
            states = 1 + tunes
            loading[key], answering[key] = states * loaded, states * row
            fixed += row * states * (min(config.latency_requests, len(made.test)) + WARM_UP)
            if tunes or config.ensemble:
                fixed += row * len(made.validation)
            if tunes:
                learning[key] = taught
    if config.experiment == "full" and config.break_even_points:
        slowest = max((f"SLM_{model.short}" for model in config.slm_models), key=lambda key: learning[key])
        sizes = break_even.sizes(len(made.train), config.break_even_points + 2)[1:-1]
        loading["break_even"] = len(sizes) * loading[slowest] / 2
        answering["break_even"] = len(sizes) * answering[slowest] / 2
        learning["break_even"] = learning[slowest] * sum(sizes) / len(made.train)
    return budget.Rates(answering, learning, loading, fixed)


def _timed(
    made: ComparisonData, model: ModelInstanceConfig, tunes: bool, should_stop: Stop
) -> tuple[float, float, float]:
    """Seconds of loading, of a row answered in every kind, and of a training row with all its labels."""
    started, prompts = time.perf_counter(), made.prompts(model)

    def load() -> models.LoadedModel:
        dtype = "float32" if tunes and made.config.method == "full" and model.dtype == "auto" else model.dtype
        return models.load_model(model.name, device=made.config.device, dtype=dtype, quantization=model.quantization)

    with memory.loaded(load) as loaded:
        loading = time.perf_counter() - started
        few = made.test[: ROWS + 1]
        _answer(loaded.model, prompts, few[:1], made.kinds, should_stop)
        row = _answer(loaded.model, prompts, few[1:] or few, made.kinds, should_stop) / len(few[1:] or few)
        taught = 0.0
        if tunes:
            settings = made.config.training(model, len(made.train)).model_copy(
                update={"steps": STEPS + 1, "eval_every": None, "keep_best": False, "checkpoint_every": None}
            )
            rows = [prompts.row(one.text, one.labels[0]) for one in made.train[: settings.batch_size * (STEPS + 1)]]
            moments: list[float] = []
            with tempfile.TemporaryDirectory(prefix="nbhelpers-") as scratch:
                tuned = training.fine_tune(
                    loaded.model,
                    rows,
                    None,
                    settings,
                    output_dir=scratch,
                    progress=lambda now: moments.append(time.perf_counter()),
                    should_stop=should_stop,
                )
            if tuned.status == "stopped":
                raise Interrupted("stopped while rates were measured")
            taught = (moments[-1] - moments[0]) / (len(moments) - 1) / settings.batch_size
            taught *= sum(len(row.labels) for row in made.train) / len(made.train)  # each label of a dialogue is taught
    return loading, row, taught


def _answer(model, prompts, rows: Sequence, kinds: Sequence[str], should_stop: Stop) -> float:
    started = time.perf_counter()
    for _ in label_answers.answered(model, prompts, rows, kinds, should_stop=should_stop):
        pass
    return time.perf_counter() - started
