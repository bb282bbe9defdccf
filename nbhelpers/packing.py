"""How do short rows share a sequence without seeing each other, so that little is computed on padding?

Rows are put into sequences as long as the longest of them (first fit, longest first). Each row keeps its own positions
from 0 and a mask lets it see itself alone, so its loss is what it would be in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nbhelpers import attention, data, losses

CHECKED = 64  # tokens of a row on which its loss is compared with the model's own


def together(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows put into as few sequences as first fit finds, none longer than the longest row; longest rows first."""
    capacity = max(len(row["input_ids"]) for row in rows)
    order = sorted(range(len(rows)), key=lambda at: (-len(rows[at]["input_ids"]), at))
    sequences: list[list[dict]] = []
    left: list[int] = []
    for row in (rows[at] for at in order):
        length = len(row["input_ids"])
        place = next((at for at, free in enumerate(left) if free >= length), None)
        if place is None:
            sequences.append([row])
            left.append(capacity - length)
        else:
            sequences[place].append(row)
            left[place] -= length
    return sequences


def why_not(model: nn.Module, longest: int) -> str | None:
    """Why rows of this model cannot share a sequence, in words; None where they can.

    model: the model itself, without a peft wrapper. longest: tokens of the longest row.
    """
    if not attention.is_installed(model):
        return f"attention of {model.config.model_type} models is not known here, so rows could see each other"
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window is not None and window < longest:
        return f"the model attends within {window} tokens and rows have up to {longest}"
    return None


def collate(sequences: Sequence[list[dict]], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """One batch of sequences. Where rows share one: position_ids (batch, length) that start at 0 in each row, and a
    boolean attention_mask (batch, 1, length, length), True where a token may look; else as data.collate makes it."""
    if all(len(rows) == 1 for rows in sequences):
        return data.collate([rows[0] for rows in sequences], device)
    longest = max(sum(len(row["input_ids"]) for row in rows) for rows in sequences)
    shape = (len(sequences), longest)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, data.IGNORED)
    positions, owner = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for at, rows in enumerate(sequences):
        start = 0
        for number, row in enumerate(rows, 1):
            length = len(row["input_ids"])
            part = slice(start, start + length)
            ids[at, part], labels[at, part] = row["input_ids"], row["labels"]
            labels[at, start] = data.IGNORED  # a row's first token is not predicted, least of all by another row
            positions[at, part], owner[at, part] = torch.arange(length), number
            start += length
    owner = owner.to(device)  # padding belongs to row 0 and sees itself: a token that sees nothing has no softmax
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in packed.items()} | {"attention_mask": mask[:, None]}


@torch.no_grad()
def loss_check(model: nn.Module, rows: Sequence[dict], packed: bool) -> dict[str, float]:
    """Nats a label token of the two shortest rows, their last CHECKED tokens: ours, as it is trained on, beside the own
    one, of the model's logits with each row alone."""
    device = next(model.parameters()).device
    few = [_end(row) for row in sorted(rows, key=lambda row: len(row["input_ids"]))[:2]]
    sequences = [few] if packed else [[row] for row in few]
    was_training = model.training
    model.eval()
    try:
        ours = sum(losses.nll_sum(model, collate([sequence], device)).item() for sequence in sequences)
        own = 0.0
        for row in few:
            logits = model(input_ids=row["input_ids"][None].to(device), use_cache=False).logits[0, :-1].float()
            own += nn.functional.cross_entropy(
                logits, row["labels"][1:].to(device), ignore_index=data.IGNORED, reduction="sum"
            ).item()
    finally:
        model.train(was_training)
    tokens = sum(int((row["labels"][1:] != data.IGNORED).sum()) for row in few)
    return {"ours": ours / tokens, "own": own / tokens, "rows": len(few), "tokens": tokens}


def _end(row: dict) -> dict:
    """The end of a row, from a token before its last label on at the latest."""
    labelled = (row["labels"][1:] != data.IGNORED).nonzero().flatten()
    stop = int(labelled[-1]) + 2
    return {name: row[name][max(0, stop - CHECKED) : stop] for name in ("input_ids", "labels")}
