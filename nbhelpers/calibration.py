"""Which text are weights scored on? Rows of a source's training part, chosen by a seed, with their fingerprint.

Scores that look at data belong to that data. The fingerprint says which it was, token for token, so that the scores of
one task never serve another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nbhelpers import data, tasks


@dataclass(frozen=True)
class Calibration:
    """rows: of data.rows, of the training part alone. tokens: in all rows; scored: those a loss is taken on.

    fingerprint: see `fingerprint`. generated: text that this project made itself.
    """

    rows: list[dict]
    source: str
    seed: int
    window: int
    tokens: int
    scored: int
    fingerprint: str
    generated: bool

    def as_dict(self) -> dict:
        """For a record: everything but the text."""
        return {**{name: value for name, value in vars(self).items() if name != "rows"}, "rows": len(self.rows)}


def calibration(tokenizer, source: str, *, number: int = 128, window: int = 512, seed: int = 0) -> Calibration:
    """`number` rows of at most `window` tokens: windows of a text, or rows of a task ("task:boolq:bundled").

    source: whatever tasks.load_corpus knows; a corpus is read to its end, and then rows are drawn without replacement.
    ValueError where the training part has fewer rows than that.
    """
    if number < 1:
        raise ValueError(f"number of calibration rows must be at least 1, got {number}")
    corpus = tasks.load_corpus(source)
    if any(document.prompt for document in corpus.train):
        rows = data.rows(tokenizer, _drawn(corpus.train, number, seed, source), window)
    else:
        rows = _drawn(data.rows(tokenizer, corpus.train, window), number, seed, source)
    return Calibration(
        rows=rows,
        source=source,
        seed=seed,
        window=window,
        tokens=sum(len(row["input_ids"]) for row in rows),
        scored=sum(int((row["labels"][1:] != data.IGNORED).sum()) for row in rows),
        fingerprint=fingerprint(rows),
        generated=corpus.generated,
    )


def fingerprint(rows: Sequence[dict]) -> str:
    """sha256 over the token ids and labels of each row, in order: equal where every score that looks at data is."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row['input_ids'])} ".encode())
        for name in ("input_ids", "labels"):
            digest.update(row[name].to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _drawn(things: Sequence, number: int, seed: int, source: str) -> list:
    if len(things) < number:
        raise ValueError(
            f"the training part of {source!r} has {len(things)} calibration rows, fewer than {number}; ask for fewer, "
            "or give more text or a smaller window"
        )
    order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed))
    return [things[at] for at in order[:number].tolist()]
