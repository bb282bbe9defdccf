"""Is text read, split and cut into windows as it says, and does bad text give one clear line?"""

from __future__ import annotations

import json
import random

import pytest
import torch
from model_fixtures import POSITIONS, make_tokenizer

from nbhelpers import data
from nbhelpers.data import Document

pytest_plugins = ["model_fixtures"]


@pytest.fixture(scope="session")
def plain():
    """A tokenizer that adds no BOS."""
    return make_tokenizer(bos=False)


@pytest.fixture(scope="session")
def starting():
    """A tokenizer that adds a BOS before each text."""
    return make_tokenizer(bos=True)


def documents(count: int) -> list[Document]:
    return [Document(f"Story {number} is about a cat.") for number in range(count)]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------- splitting


def test_twenty_documents_go_16_2_2_and_each_to_exactly_one_part():
    parts = data.split_documents(documents(20))
    assert [len(part) for part in parts] == [16, 2, 2]
    assert sorted(d.text for part in parts for d in part) == sorted(d.text for d in documents(20))


def test_the_split_does_not_depend_on_the_order_of_the_documents():
    shuffled = documents(50)
    random.Random(3).shuffle(shuffled)
    assert data.split_documents(shuffled) == data.split_documents(documents(50))


def test_equal_documents_lie_on_one_side_and_count_once():
    train, validation, test = data.split_documents([*documents(30), *documents(30), Document("  \n")])
    assert (len(train), len(validation), len(test)) == (24, 3, 3)
    assert not {d.text for d in test} & {d.text for d in [*train, *validation]}


def test_the_same_completion_after_two_prompts_is_two_documents():
    rows = [Document("yes", prompt=f"Is {n} a number?") for n in range(20)]
    assert sum(map(len, data.split_documents(rows))) == 20


def test_few_documents_are_cut_by_length_at_line_ends_the_test_part_last():
    text = "\n".join(f"line {number:02d}" for number in range(100))  # 799 characters, 8 a line
    train, validation, test = (part[0].text for part in data.split_documents([Document(text)]))
    assert train + validation + test == text
    assert train.endswith("line 79\n") and validation.endswith("line 89\n") and test.endswith("line 99")


def test_few_documents_of_prompts_and_completions_are_refused():
    with pytest.raises(ValueError, match="prompt/completion text needs at least 10 rows to split, got 2"):
        data.split_documents([Document("a", prompt="x"), Document("b", prompt="x")])


def test_overlap_counts_test_documents_that_were_trained_on():
    train, validation, test = documents(4)[:2], documents(4)[2:3], documents(4)[3:]
    corpus = data.Corpus(train, validation, test, source="x", generated=False, sha256="")
    leaky = data.Corpus(train, validation, [*test, train[0], validation[0]], source="x", generated=False, sha256="")
    assert data.overlap(corpus) == 0 and data.overlap(leaky) == 2


def test_the_bundled_text_is_stamped_disjoint_and_always_the_same():
    first, again = data.load_corpus(), data.load_corpus("bundled")
    assert first.generated and first == again
    assert data.overlap(first) == 0 and len(first.train) + len(first.validation) + len(first.test) <= 1600


def test_the_digest_follows_the_content_of_a_file(tmp_path):
    rows = [{"text": f"story {n}"} for n in range(20)]
    first = data.load_corpus(write_rows(tmp_path / "a.jsonl", rows))
    same = data.load_corpus(write_rows(tmp_path / "b.jsonl", rows[::-1]))
    other = data.load_corpus(write_rows(tmp_path / "c.jsonl", [*rows[:-1], {"text": "story 19!"}]))
    assert first.sha256 == same.sha256 != other.sha256 and not first.generated


# ---------------------------------------------------------------------------------------------------- reading files


def test_a_txt_file_is_one_document_and_a_jsonl_file_one_a_row(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo ü\n", encoding="utf-8")
    rows = write_rows(tmp_path / "b.jsonl", [{"text": "one", "id": 1}, {"text": "two"}])
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "line\\u2028break"}', encoding="utf-8")
    assert data.read_documents(tmp_path / "a.txt") == [Document("one\n\ntwo ü\n")]
    assert data.read_documents(rows) == [Document("one"), Document("two")]
    assert data.read_documents(tmp_path / "c.jsonl") == [Document("one"), Document("line\u2028break")]


def test_a_row_with_prompt_and_completion_keeps_them_apart(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    assert data.read_documents(path) == [Document(" 2", prompt="1 + 1 =")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no text"),
        (b'{"text": "  "}\n', "holds no text"),
        (b'{"text": "a"}\n{"txt": "b", "id": 1}\n', r"a.jsonl' line 2 needs a string field 'text', it has: id, txt"),
        (b'{"text": 3}', r"line 1 needs a string field 'text', it has: text"),
        (b'{"completion": "x"}', r"line 1 needs a string field 'prompt', it has: completion"),
        (b'{"text": "a"}\n[1]\n', r"line 2 is not a JSON object"),
        (b'{"text": "a"}\n\n{"text": \n', r"line 3 is not JSON: Expecting value"),
        (b'{"text": "caf\xe9"}', r"a.jsonl' is not UTF-8 at byte 13; convert it, say with iconv"),
        (b'{"text": "\\ud800"}', r"line 1 has half a surrogate pair in 'text', which is no text; repair or drop it"),
    ],
)
def test_an_unusable_file_is_named_with_its_line_and_field(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_documents(tmp_path / "a.jsonl")


def test_a_file_of_another_kind_and_a_folder_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for place in (tmp_path / "a.csv", tmp_path):
        with pytest.raises(ValueError, match=r"text must be a .txt or .jsonl file, got '.*"):
            data.load_corpus(str(place))


@pytest.mark.parametrize("source", ["nofile.txt", "folder/nofile.jsonl", "./nofile", "~/nofile", "~nobody/nofile"])
def test_an_unknown_file_is_named(source):
    with pytest.raises(LookupError, match=r"text file '.*nofile.*' does not exist"):
        data.load_corpus(source)


def test_an_empty_source_is_refused():
    with pytest.raises(LookupError, match="text must name a source, got ''"):
        data.load_corpus("")


@pytest.mark.parametrize("source", ["wikitext-2", "nobody/nothing"])
def test_a_hub_data_set_out_of_reach_gives_one_line_with_the_way_out(source):
    with pytest.raises(ValueError, match=rf"cannot read data set '{source}': .*or give a .txt or .jsonl") as caught:
        data.load_corpus(source)
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_keeps_its_own_splits_and_joins_its_lines(monkeypatch):
    import datasets

    asked = []

    def load(name, config):
        asked.append((name, config))
        return {part: {"text": [f"{part} one\n", "", f"{part} two\n"]} for part in ("train", "validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = data.load_corpus("wikitext-2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert corpus.test == [Document("test one\ntest two\n")] and corpus.train == [Document("train one\ntrain two\n")]


# ---------------------------------------------------------------------------------------------------- windows


def test_a_bos_stands_before_each_document_only_where_the_tokenizer_adds_one(plain, starting):
    texts = [Document("a cat"), Document("a dog")]
    bos, cat, dog = starting.bos_token_id, plain("a cat")["input_ids"], plain("a dog")["input_ids"]
    assert data.token_stream(starting, texts).tolist() == [bos, *cat, bos, *dog]
    assert data.token_stream(plain, texts).tolist() == [*cat, *dog]


def test_the_limit_cuts_the_stream_bos_included(starting):
    whole = data.token_stream(starting, documents(5))
    assert torch.equal(data.token_stream(starting, documents(5), limit=7), whole[:7])
    assert torch.equal(data.token_stream(starting, documents(5), limit=10**6), whole)


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    rows = data.windows(torch.arange(11), 4)
    assert [row["input_ids"].tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in rows)


def test_the_limit_counts_before_windowing(plain):
    assert len(data.rows(plain, documents(20), window=8, limit=31)) == 3


def test_less_than_one_window_is_an_error_that_names_the_option():
    with pytest.raises(ValueError, match="text has 3 tokens, less than one window of 4; .*smaller --window"):
        data.windows(torch.arange(3), 4)
    assert len(data.windows(torch.arange(4), 4)) == 1


def test_a_window_of_one_token_scores_nothing_and_is_refused():
    with pytest.raises(ValueError, match="window must be at least 2 tokens, got 1"):
        data.windows(torch.arange(3), 1)


def test_a_long_text_has_more_tokens_than_the_model_has_positions_and_is_not_cut(starting):
    assert len(data.token_stream(starting, [Document("cat " * 1000)])) > 4 * POSITIONS


# ---------------------------------------------------------------------------------------------------- prompts


def test_the_loss_is_on_the_completion_and_the_end_token_alone(starting):
    row = data.completion_row(starting, Document(" a dog", prompt="Who barks?"), window=64)
    prompt, answer = starting("Who barks?")["input_ids"], starting(" a dog", add_special_tokens=False)["input_ids"]
    assert row["input_ids"].tolist() == [*prompt, *answer, starting.eos_token_id]
    assert row["labels"].tolist() == [-100] * len(prompt) + [*answer, starting.eos_token_id]
    assert row["prompt_length"] == len(prompt)


def test_the_end_token_is_trained_even_where_it_is_the_pad_token_too():
    tokenizer = make_tokenizer(bos=False, pad=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = data.completion_row(tokenizer, Document(" a dog", prompt="Who barks?"), window=64)
    batch = data.collate([row, data.completion_row(tokenizer, Document(" a dog " * 5, prompt="Who?"), window=64)])
    end = len(row["input_ids"])
    assert batch["labels"][0, end - 1] == tokenizer.eos_token_id and batch["attention_mask"][0, end - 1] == 1
    assert (batch["labels"][0, end:] == -100).all() and (batch["attention_mask"][0, end:] == 0).all()


def test_a_long_prompt_is_cut_on_its_left_and_the_completion_kept(plain):
    whole = data.completion_row(plain, Document(" yes", prompt="word " * 50), window=1000)
    cut = data.completion_row(plain, Document(" yes", prompt="word " * 50), window=20)
    assert torch.equal(cut["input_ids"], whole["input_ids"][-20:])
    assert torch.equal(cut["labels"], whole["labels"][-20:])
    assert cut["prompt_length"] == int((cut["labels"] == -100).sum())


def test_a_completion_longer_than_a_window_is_an_error_that_names_the_option(plain):
    with pytest.raises(ValueError, match="more than a window of 8; use a larger --window"):
        data.completion_row(plain, Document("word " * 30, prompt="x"), window=8)


def test_a_token_limit_on_prompt_rows_is_refused_rather_than_ignored(plain):
    rows = [Document(" yes", prompt="Really?")] * 3
    assert len(data.rows(plain, rows, window=32)) == 3
    with pytest.raises(ValueError, match="a limit of 5 tokens is for plain text"):
        data.rows(plain, rows, window=32, limit=5)


# ---------------------------------------------------------------------------------------------------- batches


def test_the_mask_marks_real_tokens_also_those_with_id_zero_or_the_pad_id():
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([0, 5, 0], [7, 0, 0, 299, 299])]
    batch = data.collate(rows)
    assert batch["input_ids"].tolist() == [[0, 5, 0, 0, 0], [7, 0, 0, 299, 299]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[0, 5, 0, -100, -100], [7, 0, 0, 299, 299]]


@pytest.mark.data
def test_a_completion_has_the_tokens_that_scoring_asks_for_also_where_a_text_begins_with_a_mark(data_dir):
    """Tokenised by itself, ` yes` would begin with a mark of its own that stands nowhere within a text."""
    from nbhelpers import models, scoring

    tokenizer = models.load_tokenizer(str(data_dir / "models" / "stories260K-hf"))
    row = data.completion_row(tokenizer, Document(" yes", prompt="Is it so?\nAnswer:"), window=64)
    asked = scoring.question(tokenizer, "Is it so?\nAnswer:", [" yes"])
    assert tuple(row["input_ids"][: row["prompt_length"]].tolist()) == asked.context
    assert tuple(row["input_ids"][row["prompt_length"] : -1].tolist()) == asked.choices[0]
