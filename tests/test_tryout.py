"""Does trying heads by hand measure the model as it was loaded, with exactly these heads closed?"""

from __future__ import annotations

import pytest

from nbhelpers import attention, data, evaluate, models
from nbhelpers.experiments import PruningConfig
from nbhelpers.tryout import TRYOUT_WINDOWS, Tryout

CONFIG = PruningConfig(model="tiny-gpt2", window=32, sample_prompt="Once there was")


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr(data, "BUNDLED_DOCUMENTS", 60)
    made = Tryout(CONFIG)
    yield made
    made.close()


def test_perplexity_is_that_of_the_first_test_windows_with_these_heads_closed(tried):
    found = tried.measure([(0, 1), (2, 0)])
    loaded = models.load_model(CONFIG.model)
    rows = data.rows(loaded.tokenizer, data.load_corpus("bundled").test, 32)[:TRYOUT_WINDOWS]
    all_open = evaluate.perplexity(loaded.model, rows).perplexity
    attention.close_heads(loaded.model, [(0, 1), (2, 0)])
    assert found.perplexity == pytest.approx(evaluate.perplexity(loaded.model, rows).perplexity, rel=1e-6)
    assert found.all_open == pytest.approx(all_open, rel=1e-6) and found.perplexity != found.all_open
    assert found.windows == TRYOUT_WINDOWS and found.closed == [(0, 1), (2, 0)]


def test_heads_open_again_as_if_they_had_never_been_closed(tried):
    before = tried.measure([])
    tried.measure([(0, 0), (1, 1), (3, 2)])
    assert tried.measure([]) == before and before.closed == []


def test_the_text_is_greedy_so_that_only_the_heads_change_it(tried):
    assert tried.measure([(1, 0)]).sample == tried.measure([(1, 0)]).sample
    assert tried.measure([]).sample.startswith("Once there was")


def test_a_head_that_is_not_there_is_refused(tried):
    with pytest.raises(ValueError, match=r"head \(99, 0\) does not exist"):
        tried.measure([(99, 0)])
