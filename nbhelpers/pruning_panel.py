"""What does a person see of a pruning run? Stages, curves, and what went: heads, weights or MLP channels, a tab each.

The map of heads can be closed and opened by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets

from nbhelpers import catalogue, channels, mask_sets, models, notebook, plots, plots_pruning, weight_pruning
from nbhelpers.experiments import PRESETS, PruningConfig, PruningExperiment, from_preset
from nbhelpers.head_map import HeadMap
from nbhelpers.heads import STRATEGIES
from nbhelpers.registry import unknown
from nbhelpers.staged_panel import StagedPanel
from nbhelpers.weight_pruning import OF_MASKS, WeightPruningConfig, WeightPruningExperiment
from nbhelpers.widgets import Form

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


class WeightPanel(StagedPanel):
    """`WeightPanel(sparsity=0.5)`: single weights, rows or groups are masked to zero."""

    what = "weights"
    title = "Masking weights"
    question = "What does it cost to set weights to zero, and does fine-tuning under the mask bring it back?"
    promise = "Here come: perplexity and a text at each stage, the curves, the share that went, and what was checked."
    notebook_name = "01_pruning"
    command = "prune-weights"
    experiment, presets = WeightPruningExperiment, weight_pruning.PRESETS
    stages, text_field = STAGES, "text"
    words: ClassVar[Mapping[str, str]] = {
        "sparsity": "The share of the projections' weights that is zero. Embeddings, output head and norms stay.",
        "pattern": "Single weights, whole rows (structured), or N kept of every M neighbours (nm).",
        "importance": "What a weight is worth: its size, its gradient, what it is multiplied with. The least go first.",
        "scope": "What weights are compared with: those of their projection, of their row, or of the whole model.",
        "mode": "Sparse to sparse keeps the zeros through fine-tuning; sparse to dense fills them again.",
        "masks alone": "They make nothing faster or smaller: a zero is stored and multiplied like any other number.",
    }
    hidden = ("name", "what")
    main = ("model", "text", "importance", "sparsity", "pattern", "steps", "method", "mode", "control", "seed")
    parameters = (
        *("what", "model", "text", "importance", "sparsity", "pattern", "steps", "method", "control", "seed"),
    )

    def from_preset(self, preset: str, **values: Any) -> WeightPruningConfig:
        return weight_pruning.from_preset(preset, **values | {"what": self.what})

    def choices(self) -> dict[str, list[str]]:
        return super().choices() | {"importance": list(mask_sets.IMPORTANCES)}

    def model_names(self) -> list[str]:
        return [*models.bundled_names(), *catalogue.names()]

    def forget(self, config: WeightPruningConfig) -> None:
        super().forget(config)
        self.seen |= {"strategy": f"{config.what} by {config.importance}", "level": config.sparsity}

    def figures(self) -> dict[str, plots.Figure]:
        drawn = super().figures()
        return drawn | ({"went": plots_pruning.what_went(self.result)} if self.result is not None else {})

    def verdicts(self) -> list[str]:
        return [*super().verdicts(), self.result["gain"]]


class ChannelPanel(WeightPanel):
    """`ChannelPanel(sparsity=0.5)`: whole MLP channels are taken out, equally many of every layer."""

    what = "channels"
    title = "Removing MLP channels"
    question = "What does it cost to take MLP channels out, what does it give, and does fine-tuning bring it back?"
    promise = "Here come: perplexity and a text at each stage, the curves, what removal gives, and what was checked."
    words: ClassVar[Mapping[str, str]] = {
        "channel": "One of the numbers between an MLP's two layers: it goes with its row, its column and its bias.",
        "sparsity": "The share of each layer's channels that goes: equally many, so that plain transformers loads it.",
        "importance": "Of a channel: the sum of the importances of all its weights. The least go first.",
        "masks alone": "Channels set to zero make nothing faster; only taking them out does.",
    }
    hidden = (*WeightPanel.hidden, *OF_MASKS)
    main = ("model", "text", "importance", "sparsity", "steps", "method", "control", "seed")
    parameters = tuple(name for name in WeightPanel.parameters if name != "pattern")

    def model_names(self) -> list[str]:
        hub = [name for name in catalogue.names() if catalogue.entry(name).config["model_type"] in channels.MLPS]
        return [*models.bundled_names(), *hub]


PANELS: Mapping[str, Callable[..., StagedPanel]] = {
    "heads": PruningPanel,
    "weights": WeightPanel,
    "channels": ChannelPanel,
}
TABS = {"heads": "Attention heads", "weights": "Weights", "channels": "MLP channels"}


class PruningTabs:
    """`PruningTabs("tiny", what="weights", level=0.3, sparsity=0.5)`: a tab with a panel for each thing to prune.

    what: heads, weights or channels, the tab that is open first and that `run_now()` runs; the others are made when
    they are opened. Each panel takes the values that its config has; LookupError for one that `what` does not have.
    """

    def __init__(self, preset: str = "tiny", *, what: str = "heads", root: Path | None = None, **values: Any) -> None:
        if what not in PANELS:
            raise LookupError(unknown("thing to prune", what, PANELS))
        for name, value in values.items():
            if name not in _fields(what) and name not in PARAMETERS and value is not None:
                raise LookupError(unknown(f"field of pruning {what}", name, sorted(_fields(what))))
        self.preset, self.root, self.values, self.what = preset, root, values, what
        self.panels: dict[str, StagedPanel] = {}
        self.tabs = ipywidgets.Tab(children=[ipywidgets.VBox([]) for _ in PANELS])
        for at, title in enumerate(TABS.values()):
            self.tabs.set_title(at, title)
        self.tabs.selected_index = list(PANELS).index(what)
        self.tabs.add_class("nbh-tabs")
        self._open()
        self.tabs.observe(self._open, "selected_index")

    def _open(self, _change: Any = None) -> None:
        name = list(PANELS)[self.tabs.selected_index]
        if name in self.panels:
            return
        own = {key: value for key, value in self.values.items() if key in _fields(name)}
        if name == "channels" != self.what:  # what was meant for weights
            own = {key: value for key, value in own.items() if key not in OF_MASKS}
        self.panels[name] = PANELS[name](self.preset, root=self.root, **own)
        self.tabs.children[self.tabs.selected_index].children = [self.panels[name].box]

    @property
    def panel(self) -> StagedPanel:
        """The one whose tab is open."""
        return self.panels[list(PANELS)[self.tabs.selected_index]]

    @property
    def result(self) -> dict | None:
        """Of the last run of the open tab."""
        return self.panel.result

    @property
    def form(self) -> Form:
        return self.panel.form

    def run_now(self) -> dict:
        return self.panel.run_now()

    def show(self) -> None:
        self.panel.show(self.tabs)


# Parameters of the notebook that belong to one thing alone: they stand beside each other there, whatever is pruned.
PARAMETERS = {"strategy", "level", "iterative", "kv_groups", "remove", "importance", "sparsity", "pattern"}


def _fields(what: str) -> set[str]:
    """Of the config of one thing to prune."""
    return set((PruningConfig if what == "heads" else WeightPruningConfig).model_fields) - {"what"}


def model_names() -> list[str]:
    """Bundled models, and the hub models whose architecture can be pruned."""
    from nbhelpers.architecture import ARCHITECTURES

    hub = [name for name in catalogue.names() if catalogue.entry(name).config["model_type"] in ARCHITECTURES]
    return [*models.bundled_names(), *hub]
