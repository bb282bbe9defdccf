"""What did a model answer, document by document, and do two models differ on the same documents?

`predictions.jsonl` in a run directory: a line a document in the order of the data, {id, gold, loglikelihoods,
prediction, prediction_norm} of a task with choices, {id, gold, text, strict, flexible} of one with written answers,
{id, loglikelihood, tokens, bytes, words} of texts that were read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from nbhelpers import records, stats

FILE = "predictions.jsonl"
# name of a measure -> whether a line's answer is right by it; None where the line does not have it
MEASURES: dict[str, Callable[[Mapping[str, Any]], bool | None]] = {
    "acc": lambda line: None if line.get("prediction") is None else line["prediction"] == line["gold"],
    "acc_norm": lambda line: None if line.get("prediction_norm") is None else line["prediction_norm"] == line["gold"],
    "exact_match_strict": lambda line: line.get("strict"),
    "exact_match_flexible": lambda line: line.get("flexible"),
}

# name of a measure -> what it is per: exp(-sum of log-likelihoods / sum of these)
RATIOS = {"perplexity": "tokens", "byte_perplexity": "bytes", "word_perplexity": "words"}


def read(folder: str | Path) -> list[dict[str, Any]] | None:
    """The predictions of a run, or None where it has none. ValueError for a file with torn lines."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    lines, torn = records.read_lines(path)
    if torn:
        raise ValueError(f"{path} has {torn} lines that are no JSON; run the evaluation again with --resume")
    return lines


def as_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    """The text of predictions.jsonl."""
    return "".join(records.canonical_json(records.plain(line)) + "\n" for line in lines)


def outcomes(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[bool | None]]:
    """Measure -> right or not of each line; None where a line has no valid answer. Measures that no line has are left
    out."""
    found = {name: [right(line) for line in lines] for name, right in MEASURES.items()}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Paired tests of two models on the same documents, by measure that both have.

    {measure: {n, a, b, difference (a - b with its bootstrap interval over documents), only_a, only_b, mcnemar_p}}; an
    answer that is not valid counts as wrong. Perplexities have a difference alone, per token only where both models
    read the same tokens. ValueError where the documents are not the same ones.
    """
    if [line["id"] for line in a] != [line["id"] for line in b]:
        raise ValueError(
            f"predictions of {len(a)} and of {len(b)} documents with other ids: compare runs on the same rows"
        )
    if [_asked(line) for line in a] != [_asked(line) for line in b]:
        raise ValueError("the same ids have other texts or gold answers: the data changed between the two runs")
    left, right = outcomes(a), outcomes(b)
    found = {name: _paired(left[name], right[name]) for name in left if name in right}
    if all("loglikelihood" in line for line in (*a, *b)):
        same = [name for name, unit in RATIOS.items() if all(x[unit] == y[unit] for x, y in zip(a, b, strict=True))]
        found |= {name: _paired_ratio(a, b, RATIOS[name]) for name in same}
    return found


def nats_and_units(lines: Sequence[Mapping[str, Any]], unit: str) -> list[tuple[float, int]]:
    """(nats, units) of each text, as `stats.bootstrap` takes them."""
    return [(-line["loglikelihood"], line[unit]) for line in lines]


def exp_of_ratio(rows: Any) -> float:
    """exp(nats / unit) over rows: (documents, 2) of both sums; inf where that is no finite number."""
    nats, units = rows.sum(0)
    return math.exp(nats / units) if nats / units < 700 else math.inf


def _asked(line: Mapping[str, Any]) -> Any:
    return line.get("gold"), line.get("bytes"), line.get("words")


def _paired_ratio(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], unit: str) -> dict[str, Any]:
    left, right = nats_and_units(a, unit), nats_and_units(b, unit)
    difference = stats.paired_bootstrap_difference(left, right, exp_of_ratio)
    return {
        "n": len(left),
        "a": stats.bootstrap(left, exp_of_ratio, n=1).mean,
        "b": stats.bootstrap(right, exp_of_ratio, n=1).mean,
        "difference": vars(difference),
    }


def _paired(left: Sequence[bool | None], right: Sequence[bool | None]) -> dict[str, Any]:
    ours, theirs = ([float(bool(value)) for value in side] for side in (left, right))
    only_a = sum(x > y for x, y in zip(ours, theirs, strict=True))
    only_b = sum(x < y for x, y in zip(ours, theirs, strict=True))
    difference = stats.paired_bootstrap_difference(ours, theirs)
    return {
        "n": len(ours),
        "a": stats.mean(ours),
        "b": stats.mean(theirs),
        "difference": vars(difference),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": stats.mcnemar(only_a, only_b),
    }


def compare_runs(folders: Sequence[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """(tests, problems): paired tests of each two run directories that hold predictions of the same documents."""
    held, tests, problems = [], [], []
    for folder in folders:
        try:
            lines = read(folder)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if lines:
            held.append((str(folder), lines))
    for (first, a), (second, b) in combinations(held, 2):
        try:
            tests += [
                {"a_run": first, "b_run": second, "measure": name, **test} for name, test in compare(a, b).items()
            ]
        except ValueError as error:
            problems.append(f"{first} and {second}: {error}")
    return tests, problems
