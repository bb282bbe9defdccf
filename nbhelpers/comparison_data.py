"""What is a comparison made on? Dialogues, their split, and how each model reads them: all before any weights."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from nbhelpers import break_even, catalogue, dialogues, label_split, models
from nbhelpers.comparison_config import ComparisonConfig, ModelInstanceConfig
from nbhelpers.dialogues import Dialogue, Dialogues
from nbhelpers.label_answers import KINDS
from nbhelpers.label_split import Split
from nbhelpers.prompts import Prompts, Wording

UNKNOWN = {"licence": "unknown", "gated": None}


class ComparisonData:
    """Data, parts and prompts of one comparison. A budget may make `train` and `test` smaller and `epochs` fewer.

    shots: drawn training rows; each shows its first label, also where several are right.
    """

    def __init__(self, config: ComparisonConfig, data: Dialogues, split: Split, tokenizers: Mapping[str, Any]) -> None:
        self.config, self.data, self.split, self.tokenizers = config, data, split, tokenizers
        self.test: Sequence[Dialogue] = split.test
        self.validation: Sequence[Dialogue] = split.validation
        train = balanced(split.train, config.max_train_samples, config.seed)
        if config.shots >= len(train):
            raise ValueError(f"shots must be fewer than the {len(train)} training dialogues, got {config.shots}")
        self.shots = random.Random(f"shots {config.seed}").sample(list(train), config.shots)
        self.train = tuple(row for row in train if row not in self.shots)  # its own answer would stand in its prompt
        self.epochs = config.epochs

    @property
    def kinds(self) -> tuple[str, ...]:
        """How a model is asked: "ranking", "writing" or both."""
        return KINDS if self.config.answers == "both" else (self.config.answers,)

    @property
    def tunes(self) -> bool:
        """Whether any model is tuned."""
        return self.config.tunes

    def wording(self) -> Wording:
        """What is said around each dialogue: the same for all models."""
        listed = self.data.labels if len(self.data.labels) <= self.config.list_labels else ()
        return Wording(
            kind=self.data.kind,
            system=self.config.system_prompt,
            listed=tuple(listed),
            shots=tuple((row.text, row.labels[0]) for row in self.shots),
        )

    def prompts(self, model: ModelInstanceConfig) -> Prompts:
        """Prompts and labels in the tokens of one model. ValueError where nothing of a dialogue would fit."""
        window = self.config.window_of(model)
        return Prompts(self.tokenizers[model.name], self.wording(), self.data.labels, window, self.config.new_tokens)

    def reduce(self, test_rows: int, training_rows: int, epochs: int) -> None:
        """Keep so many rows: of the test the first, whose order is drawn; of training ones labels in turn."""
        self.test = self.test[:test_rows]
        if self.tunes:
            self.train, self.epochs = balanced(self.train, training_rows, self.config.seed), epochs


def prepared(config: ComparisonConfig) -> ComparisonData:
    """Read, clean and split the data, and load the tokenizers: what is wrong with data and model names is said here."""
    taking_part = [model for members in config.sides.values() for model in members]
    for model in taking_part:
        _can_be_read(model.name)
    data = dialogues.read(
        config.data,
        dialogue_column=config.dialogue_column,
        label_column=config.label_column,
        kind=config.label_kind,
        several=config.several,
        labels=config.labels,
    )
    split = label_split.split(data, seed=config.seed, mode=config.split, limit_test=config.max_eval_samples)
    if not split.validation and config.tunes:
        raise ValueError(
            f"no label of {data.source!r} has 4 dialogues or more, so none is left to choose a tuned model's best "
            "state by; give more dialogues a label, or ask the large models alone (experiment baseline)"
        )
    made = ComparisonData(config, data, split, {model.name: models.load_tokenizer(model.name) for model in taking_part})
    for model in taking_part:
        made.prompts(model)
    return made


def licences(config: ComparisonConfig) -> dict[str, dict[str, Any]]:
    """{model: {"licence", "gated"}} of the models that take part, as the catalogue has them.

    licence: "unknown" where it has none. gated: whether the hub asks for consent first; None where that is unknown.
    """
    found = {}
    for model in (model for members in config.sides.values() for model in members):
        source, known = models.locate(model.name)[0], catalogue.known(model.name)
        if source != "hub":
            found[model.name] = {"licence": "mit" if source == "bundled" else "unknown", "gated": False}
        else:
            found[model.name] = {"licence": known.licence, "gated": known.gated} if known else UNKNOWN
    return found


def _can_be_read(name: str) -> None:
    """ValueError for a model whose config cannot be read; of a gated one without a token it names what is open."""
    try:
        models.load_config(name)
    except ValueError as error:
        source, known = models.locate(name)[0], catalogue.known(name)
        gated = known.gated is not False if known else "gated" in str(error).lower()
        if source != "hub" or not gated or catalogue.token_state() == "present":
            raise
        large, small = (", ".join(model.name for model in catalogue.open_set(role)) for role in ("llm", "slm"))
        asks = "may ask" if known and known.gated is None else "asks"
        raise ValueError(
            f"{name!r} {asks} for consent on its hub page ({known.licence if known else 'licence unknown'}) and no "
            "token is here: set HF_TOKEN in the environment or in Colab's secrets, or take models that ask for none "
            f"and may be used commercially, large: {large}; small: {small}. What was tried: {error}"
        ) from error


def balanced(rows: Sequence[Dialogue], most: int | None, seed: int) -> tuple[Dialogue, ...]:
    """At most so many rows, one of every label in turn, in their order."""
    if most is None or most >= len(rows):
        return tuple(rows)
    (chosen,) = break_even.subsets([row.labels[0] for row in rows], [most], seed)
    return tuple(rows[at] for at in chosen)
