"""How far does one get without a language model? Most frequent label, TF-IDF with a linear model, nearest neighbour.

They see the same training rows as the models that are fine-tuned, and rank the same label set. They may win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from nbhelpers import coding_metrics
from nbhelpers.registry import Registry

if TYPE_CHECKING:
    from nbhelpers.dialogues import Dialogue

BASELINES = Registry("baseline")
ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of ridge regression, the strongest penalty last
DEFAULT_ALPHA = 0.3  # where no validation row can choose
TEMPERATURES = tuple(10 ** (power / 10) for power in range(-30, 11))  # 0.001 to 10
COMMON = 0.05  # of the rows hold a word that counts as common
DUAL_ROWS = 12_000  # up to here rows x rows numbers are held, 1.2 GB; beyond, one regression a label


class Asked(NamedTuple):
    """What every baseline gets: rows with .id, .text and .labels, and the columns of the scores."""

    train: Sequence[Dialogue]
    validation: Sequence[Dialogue]
    test: Sequence[Dialogue]
    labels: Sequence[str]
    seed: int


class Said(NamedTuple):
    """scores: (test rows, labels), higher is better; probabilities: whether they are normalised log-probabilities."""

    scores: numpy.ndarray
    probabilities: bool
    info: dict[str, Any]


def answers(
    name: str,
    train: Sequence[Dialogue],
    validation: Sequence[Dialogue],
    test: Sequence[Dialogue],
    labels: Sequence[str],
    seed: int = 0,
) -> tuple[list[dict[str, Any]], numpy.ndarray | None, dict[str, Any]]:
    """(lines, scores, info) of a baseline's answers to the test rows; no text is kept.

    labels: the closed set, columns in this order. scores: float32 (test rows, labels) normalised log-probabilities,
    None where a baseline has similarities alone (then a line's "probability" is None). info: what was fitted and how.
    """
    for part, rows in (("train", train), ("test", test)):
        if not rows:
            raise ValueError(f"a baseline needs {part} rows, got none")
    known = set(labels)
    odd = sorted({label for row in train for label in row.labels} - known)
    if odd:
        raise ValueError(f"training rows have {len(odd)} labels outside the label set, such as {odd[0]!r}")
    said = BASELINES[name](Asked(train, validation, test, labels, seed))
    lines = coding_metrics.ranked_lines(test, said.scores, labels)
    if not said.probabilities:
        lines = [line | {"probability": None} for line in lines]
    scores = said.scores.astype(numpy.float32) if said.probabilities else None
    return lines, scores, {"name": name, "training_rows": len(train), **said.info}


@BASELINES.register("majority")
def majority(asked: Asked) -> Said:
    """Every row gets the labels by training frequency, (rows + 1) / (all + labels): no label is impossible."""
    shares = _indicators(asked.train, asked.labels).sum(0) + 1
    scores = numpy.log(shares / shares.sum())
    return Said(numpy.tile(scores, (len(asked.test), 1)), True, {"parameters": len(asked.labels)})


@BASELINES.register("nearest")
def nearest(asked: Asked) -> Said:
    """A label's score is the cosine similarity of its nearest training row (TF-IDF); without a row it comes last."""
    train, test, features = _tfidf(asked.train, asked.test)
    near = _products(test, train)
    row, column = _indicators(asked.train, asked.labels).T.nonzero()  # label by label
    first = numpy.searchsorted(row, numpy.unique(row))
    scores = numpy.full((len(asked.test), len(asked.labels)), -1.0)
    scores[:, numpy.unique(row)] = numpy.maximum.reduceat(near[:, column], first, axis=1)
    return Said(scores, False, {"features": features, "parameters": None})


@BASELINES.register("tfidf_linear")
def tfidf_linear(asked: Asked) -> Said:
    """Ridge regression of one-hot labels on TF-IDF of words and pairs of words (scikit-learn's RidgeClassifier).

    The penalty is the one of the grid with the most right validation rows (of equals, the stronger), and log-
    probabilities are log softmax(decision / temperature) with the temperature most likely on validation. Fitted on the
    training rows alone. A row with several labels is hot at each. The seed has no say: the minimum is one.
    """
    both = [*asked.validation, *asked.test]
    train, other, features = _tfidf(asked.train, both)
    decide = _dual if len(asked.train) <= DUAL_ROWS else _primal
    gold = _indicators(asked.validation, asked.labels) > 0 if asked.validation else None
    alphas = ALPHAS if asked.validation else (DEFAULT_ALPHA,)
    chosen: dict[str, Any] = {"validation_accuracy": -1.0}
    for alpha, decision in decide(train, other, _indicators(asked.train, asked.labels), alphas):
        held = decision[: len(asked.validation)]
        accuracy = None if gold is None else float(gold[numpy.arange(len(held)), held.argmax(1)].mean())
        if accuracy is None or accuracy >= chosen["validation_accuracy"]:
            chosen = {"alpha": alpha, "validation_accuracy": accuracy, "decision": decision}
    decision = chosen.pop("decision")
    held, tested = decision[: len(asked.validation)], decision[len(asked.validation) :]
    temperature = 1.0 if gold is None else _temperature(held, gold)
    info = {"features": features, "parameters": features * len(asked.labels), "temperature": temperature, **chosen}
    info["chosen_by"] = "validation" if gold is not None else "default, as there are no validation rows: not calibrated"
    return Said(_log_softmax(tested / temperature), True, info)


# ------------------------------------------------------------------------------------------------ parts


def _tfidf(train: Sequence[Dialogue], other: Sequence[Dialogue]) -> tuple[Any, Any, int]:
    """Rows of unit length, words and pairs of words, 1 + log of counts; words of the training rows alone."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    fitted = vectorizer.fit_transform(row.text for row in train)
    return fitted, vectorizer.transform(row.text for row in other), len(vectorizer.vocabulary_)


def _products(rows: Any, others: Any, together: int = 256) -> numpy.ndarray:
    """(rows, others) dot products of two sparse matrices with the same columns.

    Words of many rows as dense columns, the rest sparse and few rows at a time: all sparse takes twice the time.
    """
    common = others.getnnz(0) > COMMON * others.shape[0]
    found = rows[:, common].toarray() @ others[:, common].toarray().T
    rare, turned = rows[:, ~common], others[:, ~common].T.tocsr()
    for at in range(0, len(found), together):
        found[at : at + together] += rare[at : at + together] @ turned
    return found


def _indicators(rows: Sequence[Dialogue], labels: Sequence[str]) -> numpy.ndarray:
    columns = {label: column for column, label in enumerate(labels)}
    found = numpy.zeros((len(rows), len(labels)))
    for place, row in enumerate(rows):
        for label in row.labels:
            if label in columns:
                found[place, columns[label]] = 1
    return found


def _dual(train: Any, other: Any, wanted: numpy.ndarray, alphas: Sequence[float]):
    """(alpha, decision of the other rows) by rows x rows products: thousands of labels cost hardly more than few."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.preprocessing import KernelCenterer

    centerer, mean = KernelCenterer(), wanted.mean(0)
    products = _products(train, train)
    products = centerer.fit(products).transform(products, copy=False)
    asked = centerer.transform(_products(other, train), copy=False)
    for alpha in alphas:
        model = KernelRidge(alpha=alpha, kernel="precomputed").fit(products, wanted - mean)
        yield alpha, model.predict(asked) + mean


def _primal(train: Any, other: Any, wanted: numpy.ndarray, alphas: Sequence[float]):
    """The same minimum by one regression a label: for many rows."""
    from sklearn.linear_model import Ridge

    for alpha in alphas:
        yield alpha, Ridge(alpha=alpha, solver="sparse_cg", tol=1e-6).fit(train, wanted).predict(other)


def _temperature(decision: numpy.ndarray, gold: numpy.ndarray) -> float:
    """The temperature of the grid with the highest mean log-probability of a right label."""

    def likelihood(temperature: float) -> float:
        return float(numpy.where(gold, _log_softmax(decision / temperature), -math.inf).max(1)[gold.any(1)].mean())

    return max(TEMPERATURES, key=likelihood)


def _log_softmax(scores: numpy.ndarray) -> numpy.ndarray:
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(1, keepdims=True))
