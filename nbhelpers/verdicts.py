"""Did specialisation beat size? Yes, no or cannot tell, from right or wrong on the same documents.

The rule. The difference is the best fine-tuned small model minus the best large one, with an interval over documents in
which every resample chooses its own best, and an exact McNemar test of the two, Holm-corrected over all pairs of a
large and a small model. "yes" needs both: an interval above 0 and a corrected p below 0.05; "no" both on the other
side. Everything else is "cannot tell", with the smallest difference that these documents could have told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from statistics import NormalDist
from typing import Any

import numpy

from nbhelpers import coding_metrics, stats

Outcomes = Mapping[str, Sequence[bool]]
LEVEL = 0.05  # of corrected p-values
NAMES = {  # endings and whole keys, as people read them
    "_untrained": " (not fine-tuned)",
    "_zero_shot": " (not fine-tuned)",
    "_finetuned": " (fine-tuned)",
}
BASELINE_NAMES = {
    "majority": "the most frequent label",
    "tfidf_linear": "TF-IDF + linear",
    "nearest": "nearest neighbour",
}
FEWEST = 20  # documents that a model must have answered to count in an interim verdict


def name(key: str) -> str:
    """`SLM_tiny-llama_finetuned` as people read it: tiny-llama (fine-tuned)."""
    kind, _, rest = key.partition("_")
    if kind == "BASELINE":
        return BASELINE_NAMES.get(rest, rest)
    if kind == "ENSEMBLE":
        return f"ensemble {rest}"
    for ending, words in NAMES.items():
        rest = rest.removesuffix(ending) + words if rest.endswith(ending) else rest
    return rest or key


def decide(
    large: Outcomes,
    small: Outcomes,
    baselines: Outcomes | None = None,
    zero_shot: Outcomes | None = None,
    *,
    measure: str = "top_1_accuracy",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The verdict: "answer", a "sentence" for people ("text" says more), and the parts they are made of.

    large, small: key -> right or not, document by document, of the models compared; small ones fine-tuned. baselines:
    what needs no language model. zero_shot: the small models before fine-tuning. All over the same documents in the
    same order. Of equally good models the first one stands for the side.

    The interval is the basic bootstrap interval [2 d - upper quantile, 2 d - lower quantile]: the best of several is
    too good by as much in a resample as in the test itself, and mirroring takes that off where percentiles add it again
    (with 5 equal small models against 1, 22 % of percentile intervals leave out 0). It ends at -1 and 1.
    """
    baselines, zero_shot = baselines or {}, zero_shot or {}
    n = _documents({**large, **small, **baselines, **zero_shot})
    shared = {"measure": measure, "n": n, "interim": False, "confidence": confidence}
    if not large or not small:
        missing = "large model" if not large else "fine-tuned small model"
        return shared | {
            **dict.fromkeys(("best_large", "best_small", "difference", "mcnemar_p", "holm_p", "discordant_share")),
            **dict.fromkeys(("detectable_difference", "baselines", "specialisation")),
            "answer": "cannot tell",
            "sentence": f"Cannot tell: no {missing} has answered.",
            "text": f"Cannot tell: no {missing} has answered.",
            "tests": [],
        }
    best_large, best_small = best(large), best(small)
    tests = pairs({**small, **large}, measure, product(small, large), confidence, resamples, seed)
    decisive = next(test for test in tests if (test["a"], test["b"]) == (best_small, best_large))
    interval = _best_difference(small, large, confidence, resamples, seed)
    differ = (decisive["only_a"] + decisive["only_b"]) / n
    found = shared | {
        "answer": _answer(interval, decisive["holm_p"]),
        "best_large": _side(best_large, large, confidence, resamples, seed),
        "best_small": _side(best_small, small, confidence, resamples, seed),
        "difference": interval,
        "mcnemar_p": decisive["mcnemar_p"],
        "holm_p": decisive["holm_p"],
        "discordant_share": differ,
        "detectable_difference": detectable_difference(n, differ, level=LEVEL / len(tests)),
        "tests": tests,
    }
    options = {"measure": measure, "confidence": confidence, "resamples": resamples, "seed": seed}
    found["baselines"] = _baselines(baselines, {best_large: large[best_large], best_small: small[best_small]}, options)
    found["specialisation"] = _specialisation(best_small, small, zero_shot, options)
    sentence, told, gave = _sentence(found), found["baselines"], found["specialisation"]
    matters = told is not None and set(told["against"].values()) != {"worse"}
    said = f"{sentence[:-1]}; and {told['sentence']}" if matters else sentence
    rest = [part["sentence"] for part in (gave, None if matters else told) if part]
    return found | {"sentence": said, "text": " ".join([said, *rest])}


def interim(
    large: Outcomes,
    small: Outcomes,
    baselines: Outcomes | None = None,
    zero_shot: Outcomes | None = None,
    *,
    asked: int,
    **options: Any,
) -> dict[str, Any]:
    """`decide` on the documents that every model has answered so far, marked as such; it may still turn.

    asked: documents of the whole test. Models with fewer than 20 answers (or all asked) are left out, as "waiting".
    """
    fewest = min(FEWEST, asked)
    sides = [side or {} for side in (large, small, baselines, zero_shot)]
    ready = [{key: right for key, right in side.items() if len(right) >= fewest} for side in sides]
    waiting = [key for side, kept in zip(sides, ready, strict=True) for key in side if key not in kept]
    n = min((len(right) for side in ready for right in side.values()), default=0)
    found = decide(*({key: right[:n] for key, right in side.items()} for side in ready), **options)
    so_far = f"So far, after {n} of {asked} test documents (this may still turn): "
    texts = {part: so_far + found[part] for part in ("sentence", "text")}
    return found | {"interim": True, "asked": asked, "waiting": waiting, **texts}


def best(models: Outcomes) -> str:
    """The key with the most right answers; the first of equals."""
    return max(models, key=lambda key: sum(map(bool, models[key])))


def pairs(
    outcomes: Outcomes,
    measure: str = "top_1_accuracy",
    which: Iterable[tuple[str, str]] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired tests of models on the same documents: of each two, or of the pairs named.

    Difference a - b with its bootstrap interval (exact where no document tells them apart), documents that only one
    got right, the exact McNemar p, and that p corrected (Holm 1979) over all tests of this list.
    """
    n = _documents(outcomes)
    found = []
    for a, b in combinations(outcomes, 2) if which is None else which:
        left, right = (numpy.asarray(outcomes[key], dtype=bool) for key in (a, b))
        only_a, only_b = int((left & ~right).sum()), int((right & ~left).sum())
        mean = float(left.mean() - right.mean())
        drawn = coding_metrics.resampled_accuracies([left, right], resamples, seed)
        low, high = numpy.quantile(drawn[:, 0] - drawn[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = _unless_collapsed(float(low), float(high), mean, n, confidence)
        found.append(
            {
                "a": a,
                "b": b,
                "measure": measure,
                "n": n,
                "difference": {"mean": mean, "low": low, "high": high},
                "only_a": only_a,
                "only_b": only_b,
                "mcnemar_p": stats.mcnemar(only_a, only_b),
            }
        )
    corrected = holm([test["mcnemar_p"] for test in found])
    return [test | {"holm_p": p} for test, p in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest times (m - i + 1), never below the one before, at most 1."""
    corrected, so_far = [0.0] * len(p_values), 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - step) * p_values[index]))
        corrected[index] = so_far
    return corrected


def detectable_difference(n: int, discordant_share: float, power: float = 0.8, level: float = LEVEL) -> float | None:
    """Smallest difference in accuracy that a McNemar test of n documents finds with this power; None where none.

    n = (z(1 - level / 2) sqrt(s) + z(power) sqrt(s - d^2))^2 / d^2 (Connor 1987) solved for d, where s is the share of
    documents on which exactly one of the two is right. d cannot be larger than s: then nothing can be told.
    """
    if n < 1 or not 0 <= discordant_share <= 1:
        raise ValueError(f"n must be at least 1 and discordant_share in [0, 1], got {n} and {discordant_share}")
    z, z_power = NormalDist().inv_cdf(1 - level / 2), NormalDist().inv_cdf(power)
    under_root = n + z_power**2 - z**2
    if discordant_share == 0 or under_root < 0:
        return None
    told = math.sqrt(discordant_share) * (z * math.sqrt(n) + z_power * math.sqrt(under_root)) / (n + z_power**2)
    return told if told <= discordant_share else None


# ------------------------------------------------------------------------------------------------ parts


def _best_difference(
    small: Outcomes, large: Outcomes, confidence: float, resamples: int, seed: int
) -> dict[str, float]:
    models = [*small.values(), *large.values()]
    drawn = coding_metrics.resampled_accuracies(models, resamples, seed)
    differences = drawn[:, : len(small)].max(1) - drawn[:, len(small) :].max(1)
    tail = (1 - confidence) / 2
    low, high = numpy.quantile(differences, [tail, 1 - tail])
    mean = stats.mean(small[best(small)]) - stats.mean(large[best(large)])
    low, high = _unless_collapsed(float(2 * mean - high), float(2 * mean - low), mean, _documents(small), confidence)
    return {"mean": mean, "low": max(-1.0, low), "high": min(1.0, high)}


def _unless_collapsed(low: float, high: float, mean: float, n: int, confidence: float) -> tuple[float, float]:
    """The interval; where no resample differs, as far as a share that was seen 0 times in n documents may reach.

    Resamples of documents that all say the same are all alike, and that is no interval: as for accuracies, the exact
    binomial bound of 0 of n takes its place, on either side, within -1 and 1.
    """
    if high > low:
        return low, high
    unseen = coding_metrics.exact_interval(0, n, confidence)[1]
    return max(-1.0, mean - unseen), min(1.0, mean + unseen)


def _answer(interval: Mapping[str, float], p: float) -> str:
    if p < LEVEL and interval["low"] > 0:
        return "yes"
    return "no" if p < LEVEL and interval["high"] < 0 else "cannot tell"


def _side(key: str, models: Outcomes, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    interval = coding_metrics.accuracy_interval(models[key], confidence, resamples, seed)
    return {"key": key, "accuracy": stats.mean([float(right) for right in models[key]]), **interval}


def _baselines(baselines: Outcomes, bests: Outcomes, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the best baseline stands to the best model of each side; corrected over all baselines and both sides."""
    if not baselines:
        return None
    tests = pairs({**baselines, **bests}, which=product(baselines, bests), **options)
    key = best(baselines)
    found = {test["b"]: _stands(test) for test in tests if test["a"] == key}
    by_word = {word: [name(other) for other in found if found[other] == word] for word in ("better", "worse", "same")}
    accuracy = stats.mean([float(right) for right in baselines[key]])
    said = [
        f"does {word} than {'both' if len(names) == 2 else names[0]}"
        if word != "same"
        else f"is not separable from {'either' if len(names) == 2 else names[0]}"
        for word, names in by_word.items()
        if names
    ]
    sentence = f"{name(key)}, which needs no language model, {' and '.join(said)} ({accuracy:.1%})."
    return {
        "best": key,
        "accuracy": accuracy,
        "against": found,
        "tests": tests,
        "beats_both": by_word["same"] == by_word["worse"] == [],
        "sentence": sentence,
    }


def _stands(test: Mapping[str, Any]) -> str:
    if test["holm_p"] >= LEVEL:
        return "same"
    return "better" if test["only_a"] > test["only_b"] else "worse"


def _specialisation(
    key: str, small: Outcomes, zero_shot: Outcomes, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What fine-tuning gave the best small model; None where that model was not evaluated before it."""
    before = key.removesuffix("_finetuned") + "_zero_shot"
    if before not in zero_shot:
        return None
    (test,) = pairs({key: small[key], before: zero_shot[before]}, **options)
    went = {"better": "better", "worse": "worse", "same": "not measurably different"}[_stands(test)]
    first, last = (stats.mean([float(right) for right in side]) for side in (zero_shot[before], small[key]))
    model = name(key.removesuffix("_finetuned"))
    sentence = f"Fine-tuning took {model} from {first:.1%} to {last:.1%}: {went} (p = {test['holm_p']:.2g})."
    return {**test, "sentence": sentence}


def _sentence(found: Mapping[str, Any]) -> str:
    ours, theirs, difference = found["best_small"], found["best_large"], found["difference"]
    numbers = (
        f"{name(ours['key'])} {ours['accuracy']:.1%}, {name(theirs['key'])} {theirs['accuracy']:.1%}, difference "
        f"{100 * difference['mean']:+.1f} points [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}] "
        f"over {found['n']} documents, p = {found['holm_p']:.2g}"
    )
    if found["answer"] != "cannot tell":
        return f"{'Yes, specialisation' if found['answer'] == 'yes' else 'No, size'} won: {numbers}."
    told = found["detectable_difference"]
    limit = (
        f"a difference under {100 * told:.1f} points would mostly go unseen here"
        if told is not None
        else f"the two differ on {round(found['discordant_share'] * found['n'])} documents, too few to tell anything"
    )
    return f"Cannot tell whether specialisation beat size: {numbers}; {limit}."


def _documents(models: Outcomes) -> int:
    counts = {key: len(right) for key, right in models.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"models must have answered the same documents, got {counts}: compare answers to the same rows"
        )
    n = next(iter(counts.values()), 0)
    if counts and n == 0:
        raise ValueError("no documents were answered: the test part is empty")
    return n
