"""Answers without a language model, against scikit-learn and rankings that can be seen."""

import math
from collections import namedtuple

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics.pairwise import cosine_similarity

from nbhelpers import baselines, coding_metrics

Row = namedtuple("Row", "id text labels")
WORDS = {"asthma": "wheeze inhaler breath", "gout": "toe uric joint", "migraine": "aura head light"}
LABELS = [*sorted(WORDS), "unseen"]


def rows(n, start=0, noise=0.5):
    """n rows of three labels in turn; a word is the label's own, or any."""
    generator = np.random.default_rng(start)
    everything = " ".join(WORDS.values()).split()
    found = []
    for number in range(start, start + n):
        label = sorted(WORDS)[number % 3]
        own = WORDS[label].split()
        words = [str(generator.choice(everything if generator.random() < noise else own)) for _ in range(6)]
        found.append(Row(number, " ".join(words), (label,)))
    return found


TRAIN, VALIDATION, TEST = rows(45), rows(30, 100), rows(60, 200)


def ask(name, train=TRAIN, validation=VALIDATION, test=TEST, labels=LABELS):
    return baselines.answers(name, train, validation, test, labels)


@pytest.mark.parametrize("name", list(baselines.BASELINES))
def test_every_baseline_gives_ranked_answers_of_the_same_shape(name):
    lines, scores, info = ask(name)
    assert [(line["id"], line["gold"]) for line in lines] == [(row.id, list(row.labels)) for row in TEST]
    assert all(sorted(line["ranked"]) == sorted(LABELS) for line in lines)
    assert info["name"] == name and info["training_rows"] == 45
    assert coding_metrics.measure(lines, kind="labels", train_counts={}, resamples=10)["n_samples"] == 60
    if scores is not None:
        assert scores.dtype == np.float32 and scores.shape == (60, 4)
        assert np.exp(scores).sum(1) == pytest.approx(np.ones(60), abs=1e-5)
        best = [float(np.exp(row.max())) for row in scores]
        assert [line["probability"] for line in lines] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("name", list(baselines.BASELINES))
def test_no_text_is_kept_and_the_gold_labels_of_the_test_are_not_read(name):
    marked = [row._replace(text=f"{row.text} canary") for row in TEST]
    lines, _, info = ask(name, test=marked)
    assert "canary" not in f"{lines}{info}"
    turned = [row._replace(labels=("unseen",)) for row in marked]
    assert [line["ranked"] for line in ask(name, test=turned)[0]] == [line["ranked"] for line in lines]


@pytest.mark.parametrize("name", ["tfidf_linear", "nearest"])
def test_a_label_without_training_rows_comes_last(name):
    lines, _, _ = ask(name, train=TRAIN, test=TEST[:5])
    assert name != "nearest" or {line["ranked"][-1] for line in lines} == {"unseen"}
    assert "unseen" not in {line["ranked"][0] for line in lines}


def test_the_majority_is_the_commonest_label_with_its_smoothed_share():
    train = [Row(0, "a", ("gout",)), Row(1, "b", ("gout",)), Row(2, "c", ("migraine",))]
    lines, _, _ = ask("majority", train=train)
    assert {tuple(line["ranked"]) for line in lines} == {("gout", "migraine", "asthma", "unseen")}
    assert lines[0]["probability"] == pytest.approx(3 / 7)  # (2 + 1) / (3 + 4)


def test_the_linear_model_is_the_ridge_classifier_of_scikit_learn():
    _, scores, info = ask("tfidf_linear")
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    model = RidgeClassifier(alpha=info["alpha"])
    model.fit(tfidf.fit_transform(row.text for row in TRAIN), [row.labels[0] for row in TRAIN])
    decision = (model.decision_function(tfidf.transform(row.text for row in TEST)) + 1) / 2  # it codes -1 and 1
    seen = scores[:, :3] * info["temperature"]
    assert seen - seen[:, :1] == pytest.approx(decision - decision[:, :1], abs=1e-4)


def test_the_penalty_and_the_temperature_are_the_best_on_validation():
    _, _, info = ask("tfidf_linear")
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    train, held = tfidf.fit_transform(row.text for row in TRAIN), tfidf.transform(row.text for row in VALIDATION)
    right = {}
    for alpha in baselines.ALPHAS:
        said = RidgeClassifier(alpha=alpha).fit(train, [row.labels[0] for row in TRAIN]).predict(held)
        right[alpha] = np.mean(said == [row.labels[0] for row in VALIDATION])
    assert info["validation_accuracy"] == pytest.approx(max(right.values()))
    assert info["alpha"] == max(alpha for alpha in right if right[alpha] == max(right.values()))
    _, scores, _ = ask("tfidf_linear", test=VALIDATION)
    gold = [LABELS.index(row.labels[0]) for row in VALIDATION]

    def likelihood(factor):
        scaled = scores * factor
        scaled = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        return scaled[np.arange(len(gold)), gold].mean()

    assert likelihood(1) > max(likelihood(0.8), likelihood(1.25))


def test_without_validation_rows_nothing_is_chosen_and_that_is_said():
    _, _, info = ask("tfidf_linear", validation=[])
    assert (info["alpha"], info["temperature"], info["validation_accuracy"]) == (0.3, 1.0, None)
    assert info["chosen_by"].startswith("default, as there are no validation rows")


def test_many_rows_are_fitted_by_the_same_minimum(monkeypatch):
    _, few, _ = ask("tfidf_linear")
    monkeypatch.setattr(baselines, "DUAL_ROWS", 10)
    monkeypatch.setattr(baselines, "_dual", None)
    _, many, _ = ask("tfidf_linear")
    assert many == pytest.approx(few, abs=1e-3)


def test_the_nearest_neighbour_is_the_one_by_cosine():
    lines, scores, _ = ask("nearest")
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    train = tfidf.fit_transform(row.text for row in TRAIN)
    near = cosine_similarity(tfidf.transform(row.text for row in TEST), train)
    for line, similar in zip(lines, near, strict=True):
        of_label = {
            label: max(similar[at] for at, row in enumerate(TRAIN) if row.labels[0] == label) for label in WORDS
        }
        assert line["ranked"][:3] == sorted(of_label, key=lambda label: (-round(of_label[label], 9), label))
    assert scores is None and {line["probability"] for line in lines} == {None}


def test_words_and_labels_beat_the_majority_where_words_tell():
    accuracy = {}
    for name in baselines.BASELINES:
        lines, _, _ = ask(name)
        accuracy[name] = sum(line["ranked"][0] in line["gold"] for line in lines) / len(lines)
    assert accuracy["majority"] == pytest.approx(1 / 3)
    assert min(accuracy["tfidf_linear"], accuracy["nearest"]) > 0.6


@pytest.mark.parametrize("name", list(baselines.BASELINES))
def test_a_row_of_several_labels_counts_for_each(name):
    train = [Row(0, "toe joint", ("gout", "migraine")), Row(1, "inhaler", ("asthma",))]
    lines, _, _ = ask(name, train=train, test=[Row(9, "toe joint", ("gout",))])
    if name != "majority":
        assert set(lines[0]["ranked"][:2]) == {"gout", "migraine"}


def test_products_are_those_of_dense_matrices():
    tfidf = TfidfVectorizer()
    train = tfidf.fit_transform(row.text for row in TRAIN)
    test = tfidf.transform(row.text for row in TEST)
    assert baselines._products(test, train, together=7) == pytest.approx((test @ train.T).toarray())


def test_a_softmax_of_thousands_stays_finite():
    found = baselines._log_softmax(np.array([[0.0, 5000.0]]))
    assert found.tolist() == [[-5000.0, 0.0]] and math.isfinite(found[0, 0])


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"train": []}, "a baseline needs train rows, got none"),
        ({"test": []}, "a baseline needs test rows, got none"),
        ({"labels": ["gout"]}, "2 labels outside the label set, such as 'asthma'"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        ask("majority", **changed)


def test_an_unknown_baseline_is_named_with_the_known_ones():
    with pytest.raises(LookupError, match="unknown baseline 'tfidf_linea'. Did you mean 'tfidf_linear'"):
        ask("tfidf_linea")
