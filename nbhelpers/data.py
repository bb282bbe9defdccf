"""Where does the text come from, and how does it become token windows?

A source is the bundled generated text, a file (.txt, or .jsonl with `text` or `prompt` and `completion`), or a hub data
set. Documents are split before they are tokenised, equal documents always to the same side.

A **row** is a dict of LongTensors `input_ids` and `labels` (length,), -100 where no loss is taken, and for
prompt/completion rows the int `prompt_length`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nbhelpers import generated

BUNDLED = "bundled"
BUNDLED_DOCUMENTS = 1600
BUNDLED_SEED = 20_000  # away from the seeds of the bundled models' training and held-out text
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
IGNORED = -100
TEST_SHARE = VALIDATION_SHARE = 0.1
FEW_DOCUMENTS = 10  # with fewer, a text is split by length instead of by document


@dataclass(frozen=True)
class Document:
    """A text, or a prompt and its completion (then `text` is the completion and the loss is taken there alone)."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Corpus:
    """Disjoint parts of one source. `generated`: text that this project made itself, stamped wherever it is shown.

    left_out: rows of the training part left out as they stand in the test part; None where none were looked for.
    """

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    source: str
    generated: bool
    sha256: str
    left_out: int | None = None


def load_corpus(source: str = BUNDLED) -> Corpus:
    """Read a source and split it 80 / 10 / 10 (a hub data set by its own splits)."""
    if source == BUNDLED:
        documents = [Document(text) for text in generated.documents(BUNDLED_DOCUMENTS, seed=BUNDLED_SEED)]
        parts = split_documents(documents)
    elif Path(os.path.expanduser(source)).exists():
        parts = split_documents(read_documents(source))
    elif source.endswith((".txt", ".jsonl")) or source.startswith((".", "/", "~")):
        raise LookupError(f"text file {source!r} does not exist")
    else:
        parts = _hub_splits(source)
    return corpus(*parts, source=source, generated=source == BUNDLED)


def corpus(
    train: list[Document],
    validation: list[Document],
    test: list[Document],
    *,
    source: str,
    generated: bool,
    left_out: int | None = None,
) -> Corpus:
    """The parts of a source, and the digest of what they hold."""
    digest = hashlib.sha256()
    for part in (train, validation, test):
        for document in part:
            digest.update(f"{len(document.prompt)} {document.prompt}{len(document.text)} {document.text}".encode())
    return Corpus(train, validation, test, source, generated, digest.hexdigest(), left_out)


def read_documents(path: str | Path) -> list[Document]:
    """All documents of a .txt (one document) or .jsonl file. ValueError names the file, the line and the field."""
    if not str(path):
        raise LookupError(f"text must name a source, got ''; give a .txt or .jsonl file, a data set, or {BUNDLED!r}")
    path = Path(os.path.expanduser(path))  # an unknown ~user stays as it is
    if not path.exists():
        raise LookupError(f"text file {str(path)!r} does not exist")
    if not path.is_file() or path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"text must be a .txt or .jsonl file, got {str(path)!r}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 at byte {error.start}; convert it, say with iconv") from error
    documents = [Document(content)] if path.suffix == ".txt" else list(_json_documents(content, path))
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"{str(path)!r} holds no text")
    return documents


def _json_documents(content: str, path: Path) -> Iterable[Document]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{str(path)!r} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object")
        fields = ("prompt", "completion") if "completion" in row else ("text",)
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ValueError(
                    f"{place} needs a string field {field!r}, it has: {', '.join(sorted(row)) or 'nothing'}"
                )
            if any("\ud800" <= letter <= "\udfff" for letter in row[field]):
                raise ValueError(f"{place} has half a surrogate pair in {field!r}, which is no text; repair or drop it")
        yield Document(row["completion"], row["prompt"]) if "completion" in row else Document(row["text"])


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """(train, validation, test), 80 / 10 / 10, equal documents on one side, the same for every order of the documents.

    Fewer than 10 different documents are joined as they come and cut by length at line ends: the test part last.
    """
    unique = {(d.prompt, d.text): d for d in documents if d.text.strip()}
    if len(unique) < FEW_DOCUMENTS:
        if any(document.prompt for document in documents):
            raise ValueError(f"prompt/completion text needs at least {FEW_DOCUMENTS} rows to split, got {len(unique)}")
        return _split_by_length("\n".join(document.text for document in unique.values()))
    ordered = sorted(unique.values(), key=lambda d: hashlib.sha256(f"{d.prompt}\0{d.text}".encode()).digest())
    test, validation = round(len(ordered) * TEST_SHARE), round(len(ordered) * VALIDATION_SHARE)
    return ordered[test + validation :], ordered[test : test + validation], ordered[:test]


def _split_by_length(text: str) -> tuple[list[Document], list[Document], list[Document]]:
    first = _line_end(text, round(len(text) * (1 - TEST_SHARE - VALIDATION_SHARE)))
    second = _line_end(text, max(first, round(len(text) * (1 - TEST_SHARE))))
    return [Document(text[:first])], [Document(text[first:second])], [Document(text[second:])]


def _line_end(text: str, at: int) -> int:
    """The first place from `at` on where a line, or else a word, ends."""
    for mark in ("\n", " "):
        found = text.find(mark, at)
        if 0 <= found < len(text) - 1 and found - at < len(text) * 0.05:
            return found + 1
    return at


def _hub_splits(source: str) -> tuple[list[Document], list[Document], list[Document]]:
    """A hub data set's own splits, their `text` column joined (wikitext's rows are lines)."""
    from datasets import load_dataset

    name, config = WIKITEXT if source in ("wikitext-2", "wikitext2") else (source, None)
    try:
        splits = load_dataset(name, config)
        parts = [splits[part]["text"] for part in ("train", "validation", "test")]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read data set {source!r}: {reason}; check the connection and the name, "
            f"or give a .txt or .jsonl file, or {BUNDLED!r}"
        ) from error
    return tuple([Document("".join(rows))] for rows in parts)


def overlap(corpus: Corpus) -> int:
    """Test documents that also stand in the training or validation part (0 unless a source repeats itself)."""
    seen = {(document.prompt, document.text) for document in [*corpus.train, *corpus.validation]}
    return sum((document.prompt, document.text) in seen for document in corpus.test)


def token_stream(tokenizer, documents: Iterable[Document], limit: int | None = None) -> torch.Tensor:
    """Ids of all documents one after another (tokens,), each as the tokenizer starts one (BOS where it adds one)."""
    pieces, total = [], 0
    for document in documents:
        pieces.append(torch.tensor(tokenizer(document.text)["input_ids"], dtype=torch.long))
        total += len(pieces[-1])
        if limit is not None and total >= limit:
            break
    stream = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)
    return stream if limit is None else stream[:limit]


def windows(stream: torch.Tensor, window: int) -> list[dict]:
    """Rows of `window` tokens without overlap, the tail dropped. ValueError where the text is shorter than one."""
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    count = len(stream) // window
    if count == 0:
        raise ValueError(
            f"text has {len(stream)} tokens, less than one window of {window}; give more text or a smaller --window"
        )
    return [{"input_ids": ids, "labels": ids} for ids in stream[: count * window].view(count, window)]


def rows(tokenizer, documents: Sequence[Document], window: int, limit: int | None = None) -> list[dict]:
    """Rows for scoring or training: packed windows of plain text, one row a document for prompt/completion text.

    `limit`: most tokens (plain text).
    """
    if any(document.prompt for document in documents):
        if limit is not None:
            raise ValueError(f"a limit of {limit} tokens is for plain text, got prompt/completion rows; leave it out")
        return [completion_row(tokenizer, document, window) for document in documents]
    return windows(token_stream(tokenizer, documents, limit), window)


def completion_row(tokenizer, document: Document, window: int) -> dict:
    """Prompt and completion as one row; the loss is on the completion and the end token alone.

    Cut on the left to `window` tokens, so that the completion and the end of the prompt stay.
    """
    prompt = tokenizer(document.prompt)["input_ids"]
    whole = tokenizer(document.prompt + document.text)["input_ids"]
    if whole[: len(prompt)] == prompt:  # as a choice is scored; some tokenizers begin every text with a mark of its own
        completion = whole[len(prompt) :]
    else:
        completion = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    completion = completion + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    if len(completion) >= window:
        raise ValueError(
            f"completion has {len(completion)} tokens, more than a window of {window}; use a larger --window"
        )
    prompt = prompt[max(0, len(prompt) + len(completion) - window) :]
    ids = torch.tensor(prompt + completion, dtype=torch.long)
    return {"input_ids": ids, "labels": mask_prompt(ids, len(prompt)), "prompt_length": len(prompt)}


def mask_prompt(ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Labels (length,) with the prompt's positions ignored."""
    labels = ids.clone()
    labels[:prompt_length] = IGNORED
    return labels


def collate(batch: Sequence[dict], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, labels and attention_mask (batch, longest), padded on the right with id 0 that nothing looks at."""
    longest = max(len(row["input_ids"]) for row in batch)
    shape = (len(batch), longest)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for at, row in enumerate(batch):
        length = len(row["input_ids"])
        ids[at, :length], labels[at, :length], mask[at, :length] = row["input_ids"], row["labels"], 1
    return {
        name: tensor.to(device) for name, tensor in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
    }
