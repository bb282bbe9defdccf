"""Are rows read, asked and taught as the protocols say, and does a bad row give one clear line?"""

from __future__ import annotations

import csv
import hashlib
import json
import random

import pytest

from nbhelpers import data, facts, fine_tuning, models, scoring, tasks
from nbhelpers.data import Document

BUNDLED_MODELS = ("tiny-gpt2", "tiny-opt", "tiny-pythia", "tiny-llama", "small-llama")

BOOLQ = {"idx": 7, "passage": "Cats purr.", "question": "do cats purr", "label": 1}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Cooking",
    "ctx_a": "A man  stirs. [header] Soup [title] Salt it.",
    "ctx_b": "the MAN",
    "endings": ["eats it.", "[step] drinks   it.", " leaves ", "sings."],
    "label": "2",
}
GSM8K = {"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
PAGE = {"page": " = Cats = \n\n Cats purr . "}
ROW = {"boolq": BOOLQ, "hellaswag": HELLASWAG, "gsm8k": GSM8K, "perplexity": PAGE}
WIKITEXT = "EleutherAI/wikitext_document_level"


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def problems(path, count: int) -> str:
    return write(path, *({"question": f"q{n}", "answer": f"a{n}\n#### {n}"} for n in range(count)))


# ------------------------------------------------------------------------------------------------ prompts


def test_boolq_asks_after_the_passage_and_says_no_before_yes(tmp_path):
    (asked,) = tasks.documents(tasks.read("boolq", write(tmp_path / "a.jsonl", BOOLQ)))
    assert asked == tasks.Asked(7, 0, "Cats purr.\nQuestion: do cats purr?\nAnswer:", (" no", " yes"), 1)
    assert asked.lengths == (2, 3)


def test_hellaswag_takes_the_marks_out_and_replaces_two_spaces_once(tmp_path):
    (asked,) = tasks.documents(tasks.read("hellaswag", write(tmp_path / "a.jsonl", HELLASWAG)))
    # by hand: "[header]" leaves two spaces, which become one; three spaces become two; what is capitalised is lowered
    assert asked.context == "Cooking: A man stirs. Soup. Salt it. The man"
    assert asked.choices == (" eats it.", "  drinks  it.", " leaves", " sings.")
    assert asked.lengths == (8, 12, 6, 6) and asked.gold == 2 and asked.id == 24


def test_an_empty_second_part_leaves_no_space_at_the_end(tmp_path):
    (asked,) = tasks.documents(tasks.read("hellaswag", write(tmp_path / "a.jsonl", HELLASWAG | {"ctx_b": ""})))
    assert asked.context.endswith("Salt it.")


def test_gsm8k_shows_five_solved_problems_drawn_anew_for_every_row(tmp_path):
    rows, train = tasks.read("gsm8k", problems(tmp_path / "a.jsonl", 3)), problems(tmp_path / "b.jsonl", 20)
    asked = tasks.documents(rows, shots_rows=tasks.read("gsm8k", train, "train"))
    draw = random.Random(1234)
    for number, document in enumerate(asked):
        drawn = draw.sample(range(20), 5)
        shots = "".join(f"Question: q{n}\nAnswer: a{n}\n#### {n}\n\n" for n in drawn)
        assert document.context == f"{shots}Question: q{number}\nAnswer:"
        assert document.choices == () and document.gold == f"a{number}\n#### {number}"
    assert rows.task.stops == ("Question:", "</s>", "<|im_end|>") and rows.task.new_tokens == 256


def test_the_shots_of_a_row_do_not_depend_on_the_limit_or_on_rows_left_out(tmp_path):
    path, train = problems(tmp_path / "a.jsonl", 5), tasks.read("gsm8k", problems(tmp_path / "b.jsonl", 9), "train")
    whole = tasks.documents(tasks.read("gsm8k", path), shots_rows=train)
    assert tasks.documents(tasks.read("gsm8k", path, limit=2), shots_rows=train) == whole[:2]
    assert tasks.documents(tasks.read("gsm8k", path), shots_rows=train, limit=2) == whole[:2]
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]))
    left = tasks.documents(tasks.read("gsm8k", tmp_path / "c.jsonl", lenient=True), shots_rows=train)
    assert left == [whole[0], *whole[2:]]


def test_a_task_with_choices_shows_solved_rows_with_the_right_choice(tmp_path):
    rows = tasks.read("boolq", write(tmp_path / "a.jsonl", BOOLQ))
    (asked,) = tasks.documents(rows, shots=1, shots_rows=rows)
    assert asked.context == (
        "Cats purr.\nQuestion: do cats purr?\nAnswer: yes\n\nCats purr.\nQuestion: do cats purr?\nAnswer:"
    )


def test_shots_that_cannot_be_drawn_are_refused(tmp_path):
    rows, few = tasks.read("gsm8k", problems(tmp_path / "a.jsonl", 2)), tasks.read("gsm8k", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="gsm8k with 5 shots needs rows to draw them from; give --shots-data, or"):
        tasks.documents(rows)
    with pytest.raises(ValueError, match=r"5 shots need as many rows to draw from, '.*a.jsonl' has 2"):
        tasks.documents(rows, shots_rows=few)
    with pytest.raises(ValueError, match="shots must be at least 0, got -1"):
        tasks.documents(rows, shots=-1)
    other = tasks.read("boolq", write(tmp_path / "b.jsonl", BOOLQ))
    with pytest.raises(ValueError, match="shots must be rows of gsm8k, got rows of boolq"):
        tasks.documents(rows, shots=1, shots_rows=other)


def test_a_result_names_its_protocol_and_bundled_problems_have_one_of_their_own(tmp_path):
    rows = tasks.read("gsm8k", problems(tmp_path / "a.jsonl", 3))
    assert tasks.protocol(rows) == {
        "task": "gsm8k",
        "version": "3.0",
        "shots": 5,
        "split": "evaluation",
        "rows": 3,
        "source": str(tmp_path / "a.jsonl"),
        "generated": False,
    }
    bundled = tasks.read("gsm8k", "bundled", limit=2)
    assert tasks.protocol(bundled)["shots"] == 0 and bundled.task.new_tokens == 64
    assert tasks.protocol(rows, shots=3)["shots"] == 3


# The first 8 rows (5 of the official schema), asked by lm-evaluation-harness 0.4.13 itself: sha256 of the JSON of its
# pairs of context and continuation, of its contexts for gsm8k.
ASKED_BY_THE_HARNESS = {
    ("boolq", "boolq_dev"): "66c46b2d2e57bcfabfbe3e17cb7603bdd1af7f6838353780721a821b5ce11761",
    ("hellaswag", "hellaswag_val"): "f25b1690599fbe40c9b60b3c42b56a01a2c00bca026f88eb0320be333c13d753",
    (
        "hellaswag",
        "hellaswag_official_schema_5rows",
    ): "c6ba6f7c11411f9a328779bf938e69cd5dc24fea6be4ef466251441f8fee1f52",
    ("gsm8k", "gsm8k_test"): "14f051a2eed025c13905a0b7dc14297a1eaebe3fb1178461045f3bb198694601",
}


@pytest.mark.parametrize("name, file", ASKED_BY_THE_HARNESS)
def test_real_rows_are_asked_as_the_harness_asks_them(data_dir, name, file):
    rows = tasks.read(name, data_dir / f"{file}.jsonl")
    shots = tasks.read(name, data_dir / "gsm8k_train.jsonl", "train") if name == "gsm8k" else None
    asked = tasks.documents(rows, shots_rows=shots, limit=8)
    pairs = [[one.context, choice] for one in asked for choice in one.choices] or [[one.context] for one in asked]
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    assert digest == ASKED_BY_THE_HARNESS[name, file], pairs[0]


def test_real_rows_of_the_official_schema_read_as_expected(data_dir):
    asked = tasks.documents(tasks.read("hellaswag", data_dir / "hellaswag_official_schema_5rows.jsonl"))
    assert (asked[0].id, asked[0].gold) == (24, 3)
    assert asked[0].context == "Roof shingle removal: A man is sitting on a roof. He"
    assert asked[0].choices[1] == " is ripping level tiles off."


# ------------------------------------------------------------------------------------------------ rows


def test_one_table_in_four_formats_is_the_same_rows(tmp_path):
    import pandas

    rows = [HELLASWAG, HELLASWAG | {"ind": 25, "label": 0, "ctx_b": ""}]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pandas.DataFrame([row | {"label": str(row["label"])} for row in rows]).to_parquet(tmp_path / "c.parquet")
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(HELLASWAG))
        table.writeheader()
        table.writerows([row | {"endings": json.dumps(row["endings"])} for row in rows])
    read = [tasks.read("hellaswag", tmp_path / name) for name in ("a.jsonl", "b.json", "c.parquet", "d.csv")]
    assert len({rows.sha256 for rows in read}) == 1
    assert all(rows.rows == read[0].rows and len(rows) == 2 and not rows.generated for rows in read)


def test_a_json_file_of_lines_and_a_file_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "a.json").write_text(f"\ufeff{json.dumps(BOOLQ)}\n\n{json.dumps(BOOLQ | {'idx': 8})}", encoding="utf-8")
    assert [row.id for row in tasks.read("boolq", tmp_path / "a.json").rows] == [7, 8]


@pytest.mark.parametrize(
    "answer, label", [(True, 1), (False, 0), ("true", 1), ("False", 0)], ids=["true", "false", "'true'", "'False'"]
)
def test_boolq_reads_the_answer_where_there_is_no_label(tmp_path, answer, label):
    row = {"passage": "p", "question": "q", "answer": answer}
    assert tasks.read("boolq", write(tmp_path / "a.jsonl", row)).rows[0].fields["label"] == label


def test_a_row_is_called_by_its_id_where_each_row_has_one_and_by_its_position_elsewhere(tmp_path):
    rows = [BOOLQ | {"idx": idx} for idx in (9, "a", 4)]
    assert [row.id for row in tasks.read("boolq", write(tmp_path / "a.jsonl", *rows)).rows] == [9, "a", 4]
    rows[2]["idx"] = None
    assert [row.id for row in tasks.read("boolq", write(tmp_path / "a.jsonl", *rows)).rows] == [0, 1, 2]
    assert [row.id for row in tasks.read("boolq", tmp_path / "a.jsonl", limit=2).rows] == [0, 1], "whatever the limit"


def test_the_hub_is_asked_for_the_official_split(monkeypatch):
    import datasets

    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return [ROW[name] | {"idx": 99}] * 2

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in tasks.TASKS:
        for split in tasks.SPLITS:
            rows = tasks.read(name, split=split)
            assert [row.id for row in rows.rows] == [0, 1] and not rows.generated
    assert asked == [
        *(("aps/super_glue", "boolq", "train"), ("aps/super_glue", "boolq", "validation")),
        *(("Rowan/hellaswag", None, "train"), ("Rowan/hellaswag", None, "validation")),
        *(("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
        *((WIKITEXT, "wikitext-2-raw-v1", "train"), (WIKITEXT, "wikitext-2-raw-v1", "test")),
    ]


def test_a_text_is_read_as_it_stands_from_a_page_a_row_or_a_whole_file(tmp_path):
    (tmp_path / "a.txt").write_text(" One.\nTwo. ")
    assert [asked.context for asked in tasks.documents(tasks.read("perplexity", tmp_path / "a.txt"))] == [
        " One.\nTwo. "
    ]
    rows = tasks.read("perplexity", write(tmp_path / "a.jsonl", PAGE, {"text": "Two."}))
    assert [asked.context for asked in tasks.documents(rows)] == [PAGE["page"], "Two."]


def test_the_hub_out_of_reach_gives_one_line_with_the_way_out():
    with pytest.raises(ValueError, match=r"cannot read data set 'openai/gsm8k \(main\)': .*or 'bundled'") as caught:
        tasks.read("gsm8k")
    assert "\n" not in str(caught.value)


BAD = [
    ("boolq", BOOLQ | {"passage": None}, "needs a field 'passage', it has idx, label, question"),
    ("boolq", {"passage": "p", "question": "q"}, r"needs either label \(0 or 1\) or answer .*, it has nothing"),
    ("boolq", BOOLQ | {"answer": True}, "needs either label .* or answer .*, it has answer, label"),
    ("boolq", BOOLQ | {"label": 2}, "needs 'label' from 0 to 1, got 2$"),
    ("boolq", BOOLQ | {"label": True}, "needs 'label' from 0 to 1, got True"),
    ("boolq", BOOLQ | {"label": 0.5}, "needs 'label' from 0 to 1, got 0.5"),
    ("boolq", BOOLQ | {"label": float("nan")}, "needs 'label' from 0 to 1, got nan"),
    ("boolq", BOOLQ | {"label": -1}, "needs 'label' from 0 to 1, got -1; the labels of this split are hidden"),
    ("boolq", BOOLQ | {"label": None, "answer": "yes"}, "needs 'answer' to be true or false, got 'yes'"),
    ("boolq", BOOLQ | {"label": None, "answer": 1}, "needs 'answer' to be true or false, got 1"),
    ("boolq", BOOLQ | {"question": "\ud800"}, "has half a surrogate pair in 'question'"),
    ("hellaswag", HELLASWAG | {"label": ""}, "needs 'label' from 0 to 3, got ''; the labels of this split are hidden"),
    ("hellaswag", HELLASWAG | {"label": "4"}, "needs 'label' from 0 to 3, got '4'"),
    ("hellaswag", HELLASWAG | {"endings": ["a", "b", "c"]}, "needs a list of 4 strings in 'endings', got 3 of them"),
    ("hellaswag", HELLASWAG | {"endings": "a b"}, "needs a list of 4 strings in 'endings', written as JSON, got 'a b'"),
    ("hellaswag", HELLASWAG | {"endings": ["a", "b", "c", 4]}, "needs text in 'endings', got 4"),
    ("hellaswag", HELLASWAG | {"endings": ["a", "b", "c", "[x]"]}, r"needs text in each .* got '\[x\]' as number 3"),
    ("gsm8k", {"question": "q", "answer": "7"}, "needs an answer that ends with '#### ' and a number, got '7'"),
    ("gsm8k", {"question": 3, "answer": "#### 7"}, "needs text in 'question', got 3$"),
]


@pytest.mark.parametrize("name, row, message", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_file_line_and_field_and_left_out_only_if_asked(tmp_path, name, row, message, caplog):
    path = write(tmp_path / "a.jsonl", ROW[name] | {"idx": 1}, row | {"idx": 2}, ROW[name] | {"idx": 3})
    with pytest.raises(ValueError, match=rf"a.jsonl' line 2 {message}"):
        tasks.read(name, path)
    rows = tasks.read(name, path, lenient=True)
    assert [(row.id, row.position) for row in rows.rows] == [(1, 0), (3, 2)]
    assert len(rows.problems) == 1 and "line 2" in rows.problems[0]
    assert "1 of 3 rows left out" in caplog.text and "line 2" in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "'.*a.jsonl' holds no row of boolq"),
        ("a.json", "[]", "'.*a.json' holds no row of boolq"),
        ("a.csv", "passage,question,label\n", "'.*a.csv' holds no row of boolq"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.json", '[{"a": 1},\n]', "line 2 is not JSON"),
        ("a.csv", "passage,question,label\np,q,1,x\n", "line 2 has more cells than the header"),
        ("a.csv", "passage,question,label\np,q\n", "line 2 needs either label"),
        ("a.csv", 'passage,question,label\n"p,q,1\n', "is not CSV"),
        ("a.jsonl", b'{"a": "caf\xe9"}', "is not UTF-8 at byte 10"),
        ("a.parquet", b"no", "is not Parquet"),
        ("a.md", "x", r"data must be a .csv, .json, .jsonl, .parquet or .txt file, got"),
        ("a.txt", "x", r"a.txt' needs a field 'passage', it has text"),
    ],
)
def test_a_file_that_holds_no_rows_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        tasks.read("boolq", tmp_path / name)


def test_rows_of_which_none_can_be_used_are_refused_also_when_lenient(tmp_path):
    with pytest.raises(ValueError, match=r"holds no row of boolq; '.*' line 1 needs 'label'"):
        tasks.read("boolq", write(tmp_path / "a.jsonl", BOOLQ | {"label": 5}), lenient=True)


def test_an_id_that_stands_twice_is_named_with_both_places(tmp_path):
    path = write(tmp_path / "a.jsonl", BOOLQ, BOOLQ | {"idx": 8}, BOOLQ)
    with pytest.raises(ValueError, match=r"line 3 repeats idx 7 of '.*' line 1; ids must differ"):
        tasks.read("boolq", path)
    rows = tasks.read("boolq", path, lenient=True)
    assert [row.id for row in rows.rows] == [7, 8] and len(rows.problems) == 1


def test_the_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path):
    path = write(tmp_path / "a.jsonl", BOOLQ, BOOLQ | {"idx": 8}, {})
    assert [row.id for row in tasks.read("boolq", path, limit=2).rows] != []
    assert len(tasks.read("boolq", path, limit=2)) == 2
    with pytest.raises(ValueError, match="limit must be at least 1 row, got 0"):
        tasks.read("boolq", path, limit=0)


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(LookupError, match="unknown task 'boolk'. Did you mean 'boolq'. Available: boolq, hellaswag"):
        tasks.read("boolk", "bundled")
    with pytest.raises(LookupError, match=r"data file '.*nothing.csv' does not exist"):
        tasks.read("boolq", tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match="split must be one of train, evaluation, got 'test'"):
        tasks.read("boolq", "bundled", "test")


# ------------------------------------------------------------------------------------------------ what can be taught


def test_a_training_example_is_the_prompt_without_shots_and_the_right_answer(tmp_path):
    found = {
        name: tasks.training_documents(tasks.read(name, write(tmp_path / "a.jsonl", ROW[name])))[0] for name in ROW
    }
    assert found["boolq"] == Document(" yes", "Cats purr.\nQuestion: do cats purr?\nAnswer:")
    assert found["hellaswag"] == Document(" leaves", "Cooking: A man stirs. Soup. Salt it. The man")
    assert found["gsm8k"] == Document(f" {GSM8K['answer']}", "Question: What is 3 + 4?\nAnswer:")


def test_a_space_at_the_end_of_a_prompt_goes_to_the_completion(tmp_path):
    row = HELLASWAG | {"ctx_b": "then [step]"}
    (document,) = tasks.training_documents(tasks.read("hellaswag", write(tmp_path / "a.jsonl", row)))
    assert document.prompt.endswith("Then") and document.text == "  leaves"


@pytest.mark.parametrize("model", BUNDLED_MODELS)
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_what_is_trained_is_token_for_token_what_is_asked(model, name):
    tokenizer = models.load_tokenizer(model)
    rows = tasks.read(name, "bundled", limit=20)
    for asked, document in zip(tasks.documents(rows), tasks.training_documents(rows), strict=True):
        if rows.task.kind == "rolling":
            assert tokenizer(document.text)["input_ids"] == scoring.encode(tokenizer, [asked.context])[0]
            continue
        row = data.completion_row(tokenizer, document, 256)
        ids, prompt = row["input_ids"].tolist(), row["prompt_length"]
        choices = asked.choices or (f" {asked.gold}",)
        question = scoring.question(tokenizer, asked.context, choices)
        right = question.choices[asked.gold if asked.choices else 0]
        assert tuple(ids[:prompt]) == question.context == tuple(tokenizer(asked.context)["input_ids"])
        assert tuple(ids[prompt:]) == (*right, tokenizer.eos_token_id)


def test_the_validation_part_is_chosen_by_the_id_whatever_the_order(tmp_path):
    rows = [BOOLQ | {"idx": n, "question": f"is {n} a number"} for n in range(300)]
    evaluation = tasks.read("boolq", write(tmp_path / "e.jsonl", BOOLQ))
    parts = [
        tasks.training_parts(tasks.read("boolq", write(tmp_path / "a.jsonl", *some), "train"), evaluation)
        for some in (rows, rows[::-1])
    ]
    assert set(parts[0].validation) == set(parts[1].validation) and 15 < len(parts[0].validation) < 45
    assert len(parts[0].train) + len(parts[0].validation) == 300 and len(parts[0].test) == 1
    low = [n for n in range(300) if hashlib.sha256(f"boolq {n}".encode()).digest()[0] <= 24]  # surely below a tenth
    chosen = {document.prompt.split("is ")[1].split()[0] for document in parts[0].validation}
    assert low and {str(n) for n in low} <= chosen


def test_evaluation_rows_among_the_training_rows_are_left_out_and_counted(tmp_path, caplog):
    rows = [BOOLQ | {"idx": n, "question": f"is {n} a number"} for n in range(100)]
    train = tasks.read("boolq", write(tmp_path / "a.jsonl", *rows), "train")
    evaluation = tasks.read("boolq", write(tmp_path / "b.jsonl", *(row | {"label": 0} for row in rows[:3])))
    with caplog.at_level("INFO"):
        parts = tasks.training_parts(train, evaluation)
    assert parts.overlap == 3 and len(parts.train) + len(parts.validation) == 97
    assert not {d.prompt for d in parts.test} & {d.prompt for d in [*parts.train, *parts.validation]}
    assert "3 of 100 training rows of boolq are evaluation rows too, left out" in caplog.text


def test_rows_with_one_prompt_stay_on_one_side(tmp_path):
    rows = [BOOLQ | {"idx": n, "question": f"is {n // 5} a number", "label": n % 2} for n in range(500)]
    parts = tasks.training_parts(tasks.read("boolq", write(tmp_path / "a.jsonl", *rows), "train"))
    sides = [{document.prompt for document in part} for part in parts[:3]]
    assert sum(map(len, sides)) == 100 and all(sides)
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_too_few_rows_to_train_on_are_refused(tmp_path):
    train = tasks.read("boolq", write(tmp_path / "a.jsonl", BOOLQ), "train")
    with pytest.raises(
        ValueError, match=r"too few rows of boolq to train on: of 1, 1 are evaluation rows too and none"
    ):
        tasks.training_parts(train, train)


def test_a_task_is_a_corpus_bundled_or_of_a_file_and_other_sources_stay_what_they_were(tmp_path):
    bundled = tasks.load_corpus("task:gsm8k:bundled")
    assert bundled.generated and data.overlap(bundled) == 0 and bundled.source == "task:gsm8k:bundled"
    assert len(bundled.test) == 500 and len(bundled.train) + len(bundled.validation) == 3000
    assert bundled == tasks.load_corpus("task:gsm8k:bundled")
    rows = [BOOLQ | {"idx": n, "question": f"is {n} a number"} for n in range(100)]
    filed = tasks.load_corpus("task:boolq:" + write(tmp_path / "a.jsonl", *rows))
    assert not filed.generated and len(filed.train) + len(filed.validation) + len(filed.test) == 100
    assert data.overlap(filed) == 0 and filed.test[0].text == " yes"
    plain = write(tmp_path / "b.jsonl", *({"text": f"story {n}"} for n in range(20)))
    assert tasks.load_corpus(plain) == data.load_corpus(plain)


def test_a_corpus_of_the_hub_is_tested_on_its_evaluation_rows(monkeypatch):
    import datasets

    def load(path, config, split):
        return [{"question": f"{split} {n}", "answer": f"#### {n}"} for n in range(60)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = tasks.load_corpus("task:gsm8k")
    assert corpus.left_out == 0
    assert {document.prompt.split()[1] for document in corpus.test} == {"test"} and len(corpus.test) == 60
    assert {document.prompt.split()[1] for document in [*corpus.train, *corpus.validation]} == {"train"}


def test_a_run_says_how_many_evaluation_rows_stood_among_the_training_rows(monkeypatch):
    import datasets

    def load(path, config, split):
        first = 0 if split == "train" else 58
        return [{"question": f"question {first + n}", "answer": f"#### {n}"} for n in range(60)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    fact = facts.texts_are_disjoint(tasks.load_corpus("task:gsm8k"))
    assert fact.ok and "0 of 60 shared, 2 left out of the training text beforehand" in str(fact.as_dict())


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("task:boolk:bundled", LookupError, "unknown task 'boolk'"),
        ("task:", LookupError, "unknown task ''"),
        ("task:boolq:", ValueError, "data 'task:boolq:' names no file after its last colon"),
        ("task:boolq:nothing.jsonl", LookupError, "data file 'nothing.jsonl' does not exist"),
        ("nothing.jsonl", LookupError, "text file 'nothing.jsonl' does not exist"),
    ],
)
def test_a_corpus_that_is_not_there_is_named(source, error, message):
    with pytest.raises(error, match=message):
        tasks.load_corpus(source)


def test_whether_a_corpus_is_at_hand_is_known_without_reading_it(tmp_path):
    path = write(tmp_path / "a.jsonl", BOOLQ)
    assert all(
        map(tasks.is_local, ("bundled", "bundled-instructions", path, "task:boolq:bundled", f"task:boolq:{path}"))
    )
    assert not any(map(tasks.is_local, ("wikitext-2", "task:boolq")))


def test_fine_tuning_takes_a_task_as_its_data():
    config = fine_tuning.FineTuningConfig(model="tiny-llama", data="task:boolq:bundled")
    tokenizer, corpus, _, rows = fine_tuning.FineTuningExperiment._check(config)
    assert corpus.generated and len(rows["test"]) == 500
    asked = tasks.documents(tasks.read("boolq", "bundled", limit=1))[0]
    assert (
        rows["test"][0]["input_ids"][: rows["test"][0]["prompt_length"]].tolist()
        == tokenizer(asked.context)["input_ids"]
    )


# ------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_every_task_says_all_that_reading_asking_and_teaching_need(name):
    task = tasks.find(name)
    assert task.name == name and len(task.splits) == 2 and task.metrics
    rows = tasks.read(name, "bundled", limit=4)
    assert rows.task.shots == 0, "the bundled models have few positions"
    for asked, document in zip(tasks.documents(rows), tasks.training_documents(rows), strict=True):
        if task.kind == "rolling":  # nothing is asked: a text to read, or to learn
            assert not asked.choices and not task.new_tokens and (document.prompt, document.text) == ("", asked.context)
            continue
        assert bool(asked.choices) == (task.kind == "choices") != bool(task.new_tokens) == bool(task.stops)
        right = asked.choices[asked.gold] if asked.choices else f" {asked.gold}"
        assert (document.prompt, document.text) == (asked.context, right) and right.startswith(" ")
