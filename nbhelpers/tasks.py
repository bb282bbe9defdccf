"""Which question is a model asked, what counts as right, and what can be trained on? BoolQ, HellaSwag, GSM8K, text.

Prompts, choices and shots are those of lm-evaluation-harness 0.4.13 to the letter, so that numbers are comparable.
A task is one function registered in TASKS. `read` gives its rows, `documents` what a model is asked,
`training_documents` what it can be taught: the same prompts with the right answers.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nbhelpers import data, generated_tasks, instructions, task_files
from nbhelpers.registry import Registry

BUNDLED = data.BUNDLED
SOURCE = "task:"  # what a corpus is called that is a task: task:boolq, task:boolq:bundled, task:boolq:FILE
SPLITS = ("train", "evaluation")
IDS = ("idx", "ind", "id")  # the first of these that each row of a file has names its rows
SHOT_SEED = 1234
PROBLEMS_NAMED = 3
TASKS = Registry("task")
log = logging.getLogger(__name__)

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One task. Its functions take a row's fields as `check` gives them.

    check: the fields that count, or ValueError naming the field. choices: with their leading space, none for "text".
    gold: number of the right choice, or the whole right answer without its leading space. A task of kind "rolling" asks
    nothing: its prompt is a text of which each token is scored.
    """

    name: str
    version: str  # of the harness's task
    kind: Literal["choices", "text", "rolling"]
    metrics: tuple[str, ...]
    hub: tuple[str, str | None]  # data set, configuration
    splits: tuple[str, str]  # names of the hub's splits for SPLITS
    check: Callable[[Fields], dict[str, Any]]
    prompt: Callable[[Fields], str]
    gold: Callable[[Fields], int | str]
    make: Callable[[generated_tasks.Dice, int], dict[str, Any]]  # a bundled row
    choices: Callable[[Fields], list[str]] = lambda row: []
    shots: int = 0
    stops: tuple[str, ...] = ()  # a written text ends before the first of these
    new_tokens: int = 0  # most tokens written
    bundled: Mapping[str, Any] = field(default_factory=dict)  # fields that differ where bundled rows are asked

    def answer(self, row: Fields) -> str:
        """The right answer as it follows the prompt, leading space included."""
        gold = self.gold(row)
        return self.choices(row)[gold] if isinstance(gold, int) else f" {gold}"


class Row(NamedTuple):
    """id: as in the file where each row has one, else the position; position: number in the file or split, from 0."""

    id: int | str
    position: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a task. `generated`: made by this project; `problems`: rows left out, each in a line (lenient reading).

    sha256: of ids, positions and fields, whatever the file's format.
    """

    task: Task
    rows: tuple[Row, ...]
    source: str
    split: str
    generated: bool
    sha256: str
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Asked:
    """What a model is asked about one row. choices: with their leading space; empty where it writes the answer."""

    id: int | str
    position: int
    context: str
    choices: tuple[str, ...]
    gold: int | str

    @property
    def lengths(self) -> tuple[int, ...]:
        """Characters of each choice without the leading space: what acc_norm divides by."""
        return tuple(len(choice) - 1 for choice in self.choices)


def find(name: str, source: str | None = None) -> Task:
    """The task of this name as it is asked of rows from `source`. LookupError for an unknown name.

    >>> find("gsm8k").shots, find("gsm8k", "bundled").shots
    (5, 0)
    """
    task = TASKS[name]()
    return replace(task, **task.bundled) if source == BUNDLED else task


def protocol(rows: Rows, shots: int | None = None) -> dict[str, Any]:
    """What a result names beside its numbers (precision is the model's to add)."""
    task = rows.task
    return {
        "task": task.name,
        "version": task.version,
        "shots": task.shots if shots is None else shots,
        "split": rows.split,
        "rows": len(rows),
        "source": rows.source,
        "generated": rows.generated,
    }


# The tasks ------------------------------------------------------------------------------------------------------------


@TASKS.register("boolq")
def boolq() -> Task:
    """Yes or no, after a passage. Clark et al. 2019, https://arxiv.org/abs/1905.10044."""

    def check(row: Fields) -> dict[str, Any]:
        found = {name: _text(row, name) for name in ("passage", "question")}
        given = [name for name in ("label", "answer") if row.get(name) not in (None, "")]
        if len(given) != 1:
            raise ValueError(f"needs either label (0 or 1) or answer (true or false), it has {_named(given)}")
        read = _flag if given == ["answer"] else lambda row, name: _number(row, name, 2)
        return found | {"label": int(read(row, given[0]))}

    return Task(
        name="boolq",
        version="2.0",
        kind="choices",
        metrics=("acc",),
        hub=("aps/super_glue", "boolq"),
        splits=("train", "validation"),
        check=check,
        prompt=lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
        choices=lambda row: [" no", " yes"],
        gold=lambda row: row["label"],
        make=generated_tasks.yes_no_question,
    )


@TASKS.register("hellaswag")
def hellaswag() -> Task:
    """How does it go on? Four endings. Zellers et al. 2019, https://arxiv.org/abs/1905.07830."""

    def check(row: Fields) -> dict[str, Any]:
        found = {name: _text(row, name) for name in ("activity_label", "ctx_a", "ctx_b")}
        endings = _texts(row, "endings", 4)
        empty = [number for number, ending in enumerate(endings) if not _without_brackets(ending)]
        if empty:
            raise ValueError(f"needs text in each of its endings, got {endings[empty[0]]!r} as number {empty[0]}")
        return found | {"endings": endings, "label": _number(row, "label", 4)}

    def prompt(row: Fields) -> str:
        return _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")

    return Task(
        name="hellaswag",
        version="1.0",
        kind="choices",
        metrics=("acc", "acc_norm"),
        hub=("Rowan/hellaswag", None),
        splits=("train", "validation"),
        check=check,
        prompt=prompt,
        choices=lambda row: [f" {_without_brackets(ending)}" for ending in row["endings"]],
        gold=lambda row: row["label"],
        make=generated_tasks.story_ending,
    )


def _without_brackets(text: str) -> str:
    """WikiHow's marks in square brackets taken out; two spaces become one in one pass, so that three become two."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@TASKS.register("gsm8k")
def gsm8k() -> Task:
    """A word problem, the answer written out. Cobbe et al. 2021, https://arxiv.org/abs/2110.14168."""

    def check(row: Fields) -> dict[str, Any]:
        found = {name: _text(row, name) for name in ("question", "answer")}
        if not re.search(r"#### -?[\d.,]*\d", found["answer"]):
            raise ValueError(f"needs an answer that ends with '#### ' and a number, got {found['answer'][-30:]!r}")
        return found

    return Task(
        name="gsm8k",
        version="3.0",
        kind="text",
        metrics=("exact_match_strict", "exact_match_flexible"),
        hub=("openai/gsm8k", "main"),
        splits=("train", "test"),
        check=check,
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        gold=lambda row: row["answer"],
        make=generated_tasks.word_problem,
        shots=5,
        stops=("Question:", "</s>", "<|im_end|>"),
        new_tokens=256,
        bundled={"shots": 0, "new_tokens": 64},  # the bundled models have few positions
    )


@TASKS.register("perplexity")
def perplexity() -> Task:
    """How well is text predicted? Each token of each document once, as the harness reads its task wikitext, but the
    texts as they stand (that task takes WikiText's marks out first, so its numbers are others)."""

    def check(row: Fields) -> dict[str, Any]:
        text = _text(row, "text" if row.get("page") is None else "page")
        if not text.strip():
            raise ValueError("needs a text that is not empty")
        return {"text": text}

    return Task(
        name="perplexity",
        version="1.0",
        kind="rolling",
        metrics=("perplexity", "byte_perplexity", "word_perplexity"),
        hub=("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
        splits=("train", "test"),
        check=check,
        prompt=lambda row: row["text"],
        gold=lambda row: "",
        make=generated_tasks.text,
    )


# Fields ---------------------------------------------------------------------------------------------------------------


def _text(row: Fields, name: str) -> str:
    if row.get(name) is None:
        raise ValueError(f"needs a field {name!r}, it has {_named(name for name in row if row[name] is not None)}")
    if not isinstance(row[name], str):
        raise ValueError(f"needs text in {name!r}, got {row[name]!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in row[name]):
        raise ValueError(f"has half a surrogate pair in {name!r}, which is no text; repair or drop it")
    return row[name]


def _texts(row: Fields, name: str, number: int) -> list[str]:
    """A list of so many strings; in a cell of a table, as JSON or Python writes it."""
    found = row.get(name)
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found) if found.lstrip().startswith("['") else json.loads(found)
        except (ValueError, SyntaxError):
            raise ValueError(f"needs a list of {number} strings in {name!r}, written as JSON, got {found!r}") from None
    if not isinstance(found, list) or len(found) != number:
        count = f"{len(found)} of them" if isinstance(found, list) else repr(found)
        raise ValueError(f"needs a list of {number} strings in {name!r}, got {count}")
    return [_text({name: text}, name) for text in found]


def _number(row: Fields, name: str, below: int) -> int:
    number = _integer(row.get(name))
    if number is None or not 0 <= number < below:
        hidden = "; the labels of this split are hidden" if row.get(name) in (-1, "-1", "") else ""
        raise ValueError(f"needs {name!r} from 0 to {below - 1}, got {row.get(name)!r}{hidden}")
    return number


def _integer(value: Any) -> int | None:
    """An integer, written as a number or as text (a csv file has nothing else); None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?(0|[1-9][0-9]*)", value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def _flag(row: Fields, name: str) -> bool:
    value = str(row[name]).lower() if isinstance(row[name], bool | str) else None
    if value not in ("true", "false"):
        raise ValueError(f"needs {name!r} to be true or false, got {row[name]!r}")
    return value == "true"


def _named(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"


# Rows -----------------------------------------------------------------------------------------------------------------


def read(
    task: str, source: str | Path | None = None, split: str = "evaluation", *, limit: int | None = None, lenient=False
) -> Rows:
    """Rows of a task: of the hub (None), "bundled" (generated), or a csv, json, jsonl or parquet file in its schema.

    limit: the first so many rows, in order; what follows is not looked at. A row that cannot be used is a ValueError
    that names file, line and field; with `lenient` it is left out, listed in `problems` and logged.
    """
    source = None if source is None else str(source)
    asked = find(task, source)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 row, got {limit}")
    where = asked.hub[0] if source is None else source
    rows, problems = [], []
    found = list(_found(asked, source, split))
    name = _id_field(found) if source is not None else None  # the hub's rows are called by their position
    for row in _checked(asked, found[:limit], name):
        if isinstance(row, Row):
            rows.append(row)
        elif lenient:
            problems.append(row)
        else:
            raise ValueError(row)
    if not rows:
        raise ValueError(f"{where!r} holds no row of {task}" + "".join(f"; {line}" for line in problems[:1]))
    if problems:
        more = f" and {len(problems) - PROBLEMS_NAMED} more" if len(problems) > PROBLEMS_NAMED else ""
        named = "; ".join(problems[:PROBLEMS_NAMED])
        log.warning("%d of %d rows left out: %s%s", len(problems), len(rows) + len(problems), named, more)
    content = json.dumps(rows, sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    return Rows(asked, tuple(rows), where, split, source == BUNDLED, digest, tuple(problems))


def _found(task: Task, source: str | None, split: str) -> Iterable[task_files.Found]:
    if source is None:
        return task_files.of_hub(*task.hub, task.splits[SPLITS.index(split)])
    if source == BUNDLED:
        return (task_files.Found("bundled", row) for row in generated_tasks.rows(task.make, split))
    return task_files.of_file(source)


def _id_field(found: Sequence[task_files.Found]) -> str | None:
    fields = [one.fields for one in found if one.fields is not None]
    return next((name for name in IDS if fields and all(_identity(row.get(name)) is not None for row in fields)), None)


def _identity(value: Any) -> int | str | None:
    """A number or a text that can name a row; None for anything else."""
    number = _integer(value)
    return number if number is not None else value if isinstance(value, str) and value else None


def _checked(task: Task, found: Sequence[task_files.Found], name: str | None) -> Iterator[Row | str]:
    """Each row, or what is wrong with it, in a line. name: the field with its id; None: the position is."""
    places: dict[int | str, str] = {}
    for position, one in enumerate(found):
        try:
            if one.fields is None:
                raise ValueError(one.problem)
            identity = position if name is None else _identity(one.fields[name])
            if identity in places:
                raise ValueError(f"repeats {name} {identity!r} of {places[identity]}; ids must differ")
            row = Row(identity, position, task.check(one.fields))
        except ValueError as error:
            yield f"{one.place} {error}"
            continue
        places[identity] = one.place
        yield row


# What is asked --------------------------------------------------------------------------------------------------------


def documents(
    rows: Rows, *, shots: int | None = None, shots_rows: Rows | None = None, limit: int | None = None
) -> list[Asked]:
    """What a model is asked about each row, in order; limit: the first so many positions.

    shots: solved rows before the question (None: as the task says), drawn from shots_rows anew for every position, left
    out or not, from one generator: so the prompt of a row depends on its position alone, not on the limit.
    """
    task = rows.task
    shots = task.shots if shots is None else shots
    pool = _pool(task, shots, shots_rows)
    draw = random.Random(SHOT_SEED)
    by_position = {row.position: row for row in rows.rows if limit is None or row.position < limit}
    asked = []
    for position in range(max(by_position, default=-1) + 1):
        drawn = draw.sample(pool, shots) if shots else []
        if position in by_position:
            row = by_position[position]
            solved = "".join(f"{task.prompt(shot.fields)}{task.answer(shot.fields)}\n\n" for shot in drawn)
            choices, gold = tuple(task.choices(row.fields)), task.gold(row.fields)
            asked.append(Asked(row.id, position, solved + task.prompt(row.fields), choices, gold))
    return asked


def _pool(task: Task, shots: int, shots_rows: Rows | None) -> list[Row]:
    if shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    if not shots:
        return []
    if task.kind == "rolling":
        raise ValueError(f"{task.name} reads texts and asks nothing, so it takes no shots, got {shots}")
    if shots_rows is None:
        raise ValueError(
            f"{task.name} with {shots} shots needs rows to draw them from; give --shots-data, or --shots 0"
        )
    if shots_rows.task.name != task.name:
        raise ValueError(f"shots must be rows of {task.name}, got rows of {shots_rows.task.name}")
    if len(shots_rows) < shots:
        raise ValueError(f"{shots} shots need as many rows to draw from, {shots_rows.source!r} has {len(shots_rows)}")
    return list(shots_rows.rows)


# What can be taught ---------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """Documents to train on, to choose the best state by, and to test on; training rows left out as they are tested."""

    train: list[data.Document]
    validation: list[data.Document]
    test: list[data.Document]
    overlap: int


def training_documents(rows: Rows) -> list[data.Document]:
    """Each row's prompt without shots, and the right answer with its leading space as the completion; of a task that
    asks nothing its text.

    Spaces at a prompt's end go to the completion, as they do where choices are scored.
    """
    return [_training_document(rows.task, row) for row in rows.rows]


def _training_document(task: Task, row: Row) -> data.Document:
    prompt = task.prompt(row.fields)
    if task.kind == "rolling":
        return data.Document(text=prompt)
    stripped = prompt.rstrip()
    return data.Document(prompt=stripped, text=prompt[len(stripped) :] + task.answer(row.fields))


def training_parts(train: Rows, evaluation: Rows | None = None) -> Parts:
    """Training rows in parts by a hash of their ids: a tenth for validation, and a tenth to test where no evaluation
    rows are given. Rows with one prompt go together; training rows whose prompt is an evaluation row's are left out,
    counted and logged."""
    parts: dict[str, list[data.Document]] = {"train": [], "validation": [], "test": []}
    if evaluation is not None:
        parts["test"] = training_documents(evaluation)
    tested = {document.prompt or document.text for document in parts["test"]}
    sides: dict[str, str] = {}
    overlap = 0
    for row, document in zip(train.rows, training_documents(train), strict=True):
        asked = document.prompt or document.text
        if asked in tested:
            overlap += 1
        else:
            side = sides.setdefault(asked, _side(train.task, row.id, held_out=evaluation is None))
            parts[side].append(document)
    log.info("%d of %d training rows of %s are evaluation rows too, left out", overlap, len(train), train.task.name)
    empty = [name for name, documents in parts.items() if not documents]
    if empty:
        raise ValueError(
            f"{train.source!r} has too few rows of {train.task.name} to train on: of {len(train)}, {overlap} are "
            f"evaluation rows too and none is left for {', '.join(empty)}; give more rows"
        )
    return Parts(**parts, overlap=overlap)


def _side(task: Task, identity: int | str, held_out: bool) -> str:
    digest = hashlib.sha256(f"{task.name} {identity}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < data.VALIDATION_SHARE:
        return "validation"
    return "test" if held_out and place < data.VALIDATION_SHARE + data.TEST_SHARE else "train"


def load_corpus(source: str) -> data.Corpus:
    """A task as a corpus (`task:boolq` of the hub, `task:boolq:bundled`, `task:boolq:FILE` of training rows), or any
    other that `instructions.load_corpus` knows.

    Tested on evaluation rows; on held-out rows where a file is given.
    """
    if not source.startswith(SOURCE):
        return instructions.load_corpus(source)
    name, place = _of_corpus(source)
    train = read(name, place, "train")
    parts = training_parts(train, read(name, place) if place in (None, BUNDLED) else None)
    return data.corpus(*parts[:3], source=source, generated=train.generated, left_out=parts.overlap)


def is_local(source: str) -> bool:
    """Whether a corpus can be read without the hub."""
    if source.startswith(SOURCE):
        return _of_corpus(source)[1] is not None
    return source in (BUNDLED, instructions.BUNDLED) or Path(os.path.expanduser(source)).exists()


def _of_corpus(source: str) -> tuple[str, str | None]:
    name, colon, place = source.removeprefix(SOURCE).partition(":")
    if colon and not place:
        raise ValueError(f"data {source!r} names no file after its last colon; leave the colon out for the hub's rows")
    return name, place or None
