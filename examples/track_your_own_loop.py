"""How do I keep a record of my own training loop? Five lines, marked; then a small sweep, compared from its runs.

    python examples/track_your_own_loop.py [--out runs/own_loop] [--steps 100]

The loop fits a small network to y = sin(x). Kill it at any step and all logged steps can still be read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nbhelpers.runs import read_run
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker  # 1


def train(learning_rate: float, steps: int, out: Path) -> Path:
    """A plain loop with a record; returns the run directory."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    y = torch.sin(x)
    held_out = x + 0.05
    model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    config = ExperimentConfig(name=f"sin lr={learning_rate:g}", learning_rate=learning_rate, steps=steps)  # 2
    with ExperimentTracker(config, root=out) as tracker:  # 3
        for step in range(steps):
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tracker.log_metrics(step, train_loss=loss.detach(), learning_rate=learning_rate)  # 4
        with torch.no_grad():
            val_loss = torch.nn.functional.mse_loss(model(held_out), torch.sin(held_out))
        tracker.log_eval(val_loss=val_loss)  # 5
    return tracker.run_dir


def compare(folders: list[Path]) -> None:
    """A table of what the run directories say, best first."""
    runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.curve("val_loss")[1][-1])
    print(f"{'run':<16} {'status':<9} {'steps':>5} {'first loss':>10} {'last loss':>10} {'val loss':>10}")
    for run in runs:
        steps, losses = run.curve("train_loss")
        val_loss = run.curve("val_loss")[1][-1]
        print(
            f"{run.name:<16} {run.status:<9} {len(steps):>5} {losses[0]:>10.5f} {losses[-1]:>10.5f} {val_loss:>10.5f}"
        )
    print(f"best: learning rate {runs[0].config['learning_rate']:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/own_loop")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    compare([train(rate, options.steps, Path(options.out)) for rate in (1e-1, 1e-2, 1e-3)])


if __name__ == "__main__":
    main()
