"""One process of a fine-tuning by several: `torchrun --nproc_per_node 2 rank_script.py FOLDER`, or alone.

Writes FOLDER/curve-<number>.json: losses and validation of this process, and a sum over its weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import small_models
import torch

from nbhelpers import attention, ranks
from nbhelpers.training import TrainingConfig, fine_tune


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    model = small_models.build("llama")
    attention.install(model)
    rows = small_models.text_rows((16, 9, 12, 5, 16, 7, 11, 14, 6, 10))
    config = TrainingConfig(
        method="lora", steps=6, batch_size=batch_size, learning_rate=1e-2, eval_every=3, checkpoint_every=3
    )
    told = []
    result = fine_tune(
        model, rows[:8], rows[8:], config, output_dir=folder / f"of-{ranks.count()}", progress=told.append
    )
    found = {
        "processes": result.processes,
        "group": torch.distributed.is_initialized(),
        "losses": [loss for _, loss in result.train_losses],
        "validation": [nll for _, nll in result.validation_nlls],
        "weights": sum(p.double().abs().sum().item() for p in model.parameters()),
        "label_tokens": result.label_tokens,
        "checkpoints": sorted(path.name for path in (folder / f"of-{ranks.count()}").iterdir()),
    }
    (folder / f"curve-{ranks.count()}-{ranks.number()}-{batch_size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
