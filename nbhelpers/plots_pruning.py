"""What went, and what did that give? Figures of a pruning run: heads, weights by layer, channels by what they gain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from matplotlib.figure import Figure

from nbhelpers.plots import COLORS, _figure, _plain, head_map


def what_went(result: Mapping) -> Figure:
    """The figure of the thing that was pruned."""
    if result.get("mask"):
        return weight_map(result)
    return gains(result) if result.get("channels") else head_map(result)


def weight_map(result: Mapping) -> Figure:
    """The share of the weights that went, one row a layer, one column a projection."""
    cells: dict[tuple[str, str], float] = {}
    for one in result["mask"]["per_layer"]:
        found = re.search(r"\.(\d+)\.", one["name"])
        kind = re.sub(r"^.*\.\d+\.|\.weight$", "", one["name"])
        cells["" if found is None else found[1], kind] = one["gone"] / one["numbers"]
    layers, kinds = (list(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
    shares = [[cells.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    figure = _figure(max(4.2, 0.95 * len(kinds) + 1.8), max(2.4, 0.34 * len(layers) + 1.7), result["text"]["generated"])
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            if not math.isnan(share):  # a projection that this layer does not have
                color = "white" if share > 0.55 else "black"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(kinds)), [kind.replace(".", "\n") for kind in kinds], fontsize=8)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    axes.set_title(result["went"], fontsize=11)
    figure.colorbar(image, ax=axes, label="share of weights masked")
    return figure


def gains(result: Mapping) -> Figure:
    """Parameters, bytes and speed without the channels, as parts of the whole model's; beside them masks alone."""
    speed = "tokens_per_second"
    labels = ("parameters", "bytes in the file", "tokens a second")
    removed = [result[f"{name}_after"] / result[f"{name}_before"] for name in ("parameters", "bytes", speed)]
    masked = [1.0, 1.0, result[f"{speed}_masks_alone"] / result[f"{speed}_before"]]
    figure = _figure(8.4, 2.9, result["text"]["generated"])
    axes = figure.add_subplot()
    parts = (("masks alone", masked, -0.2, COLORS["masked"]), ("channels removed", removed, 0.2, COLORS["fine_tuned"]))
    for label, values, shift, color in parts:
        bars = axes.bar([at + shift for at in range(3)], values, width=0.36, color=color, label=label)
        over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, bbox=over_the_line)
    axes.axhline(1, color=COLORS["baseline"], linewidth=1, zorder=0)
    axes.set_xticks(range(3), labels)
    axes.set_ylim(0, 1.25 * max(1.0, *masked, *removed))
    axes.set_ylabel("times the whole model's")
    axes.set_title(result["went"], fontsize=11)
    axes.legend(frameon=False, loc="upper left", ncols=2)
    _plain(axes)
    return figure
