"""What does a person see of a pruning run? Stages, curves, and a map of heads that can be closed and opened by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbhelpers import catalogue, models, notebook
from nbhelpers.experiments import PRESETS, PruningConfig, PruningExperiment, from_preset
from nbhelpers.head_map import HeadMap
from nbhelpers.heads import STRATEGIES
from nbhelpers.staged_panel import StagedPanel

STAGES = ("baseline", "pruned", "fine_tuned", "control")
WORDS = {
    "head": "One of the parallel attention units of a layer. A closed head adds exactly nothing.",
    "level": "The share of all heads that is closed, 0 to 1.",
    "sparsity": "The share of weights that is zero. Closing heads is a coarse kind of it: whole heads go, not weights.",
    "strategy": "How importance is measured; the heads with the least go first.",
    "importance": "A number a head: how much the strategy thinks is lost without it. Only the order counts.",
    "mode": "One-shot scores once; iterative scores again after every few heads.",
    "control": "The same model with all heads, fine-tuned with the same budget: what fine-tuning alone gives.",
    "perplexity": "exp of the mean loss a token on text that was never trained on; lower is better.",
}


class PruningPanel(StagedPanel):
    """`PruningPanel(preset="tiny", level=0.5)`: given values stand in the form first, then the form decides."""

    title = "Pruning attention heads"
    question = "What does it cost to close attention heads, and does fine-tuning bring it back?"
    promise = "Here come: perplexity and a text at each stage, the curves, the map of heads, and what was checked."
    notebook_name = "01_pruning"
    command = "prune-heads"
    experiment, presets, from_preset = PruningExperiment, PRESETS, staticmethod(from_preset)
    stages, words, text_field = STAGES, WORDS, "text"
    main = ("model", "text", "strategy", "level", "iterative", "kv_groups", "steps", "method", "control")
    main += ("remove", "seed")
    parameters = (
        *("model", "text", "strategy", "level", "iterative", "kv_groups", "remove"),
        *("steps", "method", "control", "seed"),
    )

    def __init__(self, preset: str = "tiny", *, root: Path | None = None, **values: Any) -> None:
        self.heads = HeadMap(self)
        super().__init__(preset, root=root, **values)
        self.extra.children = [self.heads.box]

    def choices(self) -> dict[str, list[str]]:
        return super().choices() | {"strategy": list(STRATEGIES)}

    def model_names(self) -> list[str]:
        return model_names()

    def forget(self, config: PruningConfig) -> None:
        super().forget(config)
        self.seen |= {"strategy": config.strategy, "level": config.level}
        self.heads.forget()

    def hear(self, now: Mapping[str, Any]) -> None:
        super().hear(now)
        if now["stage"] == "heads chosen":
            self.heads.show_scores(now["scores"], now["closed"])

    def verdicts(self) -> list[str]:
        return list(filter(None, [*super().verdicts(), notebook.removal(self.result)]))

    def settled(self) -> None:
        self.heads.enable(True)


def model_names() -> list[str]:
    """Bundled models, and the hub models whose architecture can be pruned."""
    from nbhelpers.architecture import ARCHITECTURES

    hub = [name for name in catalogue.names() if catalogue.entry(name).config["model_type"] in ARCHITECTURES]
    return [*models.bundled_names(), *hub]
