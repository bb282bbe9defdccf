"""What tests of figures over many runs share: four pruning runs, and the line of a label."""

from __future__ import annotations

from many_runs import pruning_run


def four_pruning_runs(place):
    """gradient at 10 % (two seeds) and 50 %, random at 10 %; the control reaches 3.6 from 4."""
    pruning_run(place / "g1", 4.0, 6.0, 5.0, control=3.6, level=0.1)
    pruning_run(place / "g2", 4.0, 6.0, 4.0, control=3.6, level=0.1, seed=1)
    pruning_run(place / "g3", 4.0, 12.0, 8.0, level=0.5)
    pruning_run(place / "r1", 4.0, 3.0, 5.0, strategy="random", level=0.1)
    return place


def line(axes, label):
    """The one line or bar series of this label."""
    (found,) = [handle for handle, said in zip(*axes.get_legend_handles_labels(), strict=True) if said == label]
    return found[0] if hasattr(found, "lines") else found
