"""Each fact says OK of a model that is right, and FAILED with the fault built in."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from small_models import NAMES, build, text_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from nbhelpers import attention, data, evaluate, facts, heads, models
from nbhelpers.tracking import Interrupted

CLOSED = [(0, 1), (1, 0), (1, 3)]
ROWS = text_rows((16, 11))


def gated(name: str = "llama", closed=(), **options):
    model = build(name, **options)
    attention.install(model)
    attention.close_heads(model, closed)
    return model


def selection(*rounds, closed=None, group_size: int = 1) -> heads.Selection:
    """From (scores, closed) pairs."""
    rounds = [{"scores": scores, "closed": [list(head) for head in now]} for scores, now in rounds]
    everything = sorted(tuple(head) for number in rounds for head in number["closed"])
    return heads.Selection(closed=closed or everything, rounds=rounds, group_size=group_size)


# ------------------------------------------------------------------------------------------------- a fact on one line


def test_a_line_begins_with_the_verdict_and_ends_with_what_was_seen():
    assert facts.Fact("n", True, "water is wet", "0 dry drops").line() == "OK     water is wet: 0 dry drops"
    assert facts.Fact("n", False, "water is wet", "3 dry drops").line() == "FAILED water is wet: 3 dry drops"


def test_a_fact_goes_into_strict_json():
    fact = facts.closed_heads_add_nothing(gated(closed=CLOSED), ROWS, CLOSED, "after_pruning")
    assert json.loads(json.dumps(fact.as_dict(), allow_nan=False)) == fact.as_dict()


# ---------------------------------------------------------------------------------------- gates that change nothing


@pytest.mark.parametrize("name", NAMES)
def test_open_gates_are_transparent(name):
    model = gated(name)
    fact = facts.gates_change_nothing_while_open(model, ROWS)
    assert fact.ok and fact.values["relative_difference"] == 0
    assert attention.is_installed(model), "the gates are back afterwards"


def test_an_attention_that_is_off_by_a_thousandth_fails_while_open(monkeypatch):
    honest = attention.sdpa_attention_forward

    def off(*inputs, **options):
        output, weights = honest(*inputs, **options)
        return output * 1.001, weights

    monkeypatch.setattr(attention, "sdpa_attention_forward", off)
    assert not facts.gates_change_nothing_while_open(gated(), ROWS).ok


def test_the_gates_are_back_when_the_stock_attention_raises(monkeypatch):
    model = gated(closed=CLOSED)
    honest = facts.logits

    def broken(model, rows):
        if not attention.is_installed(model):
            raise RuntimeError("planned")
        return honest(model, rows)

    monkeypatch.setattr(facts, "logits", broken)
    with pytest.raises(RuntimeError, match="planned"):
        facts.gates_change_nothing_while_open(model, ROWS)
    assert attention.closed_heads(model) == CLOSED


def test_logits_are_those_of_evaluation_and_leave_the_mode_as_it_was():
    model = gated("gpt2")  # it has dropout
    expected = facts.logits(model, ROWS)
    assert torch.equal(facts.logits(model.train(), ROWS), expected) and model.training


# ---------------------------------------------------------------------------------------- the strategy asked for


@pytest.mark.parametrize("strategy", heads.STRATEGIES.names())
@pytest.mark.parametrize("closed", [[], CLOSED, heads.all_heads(3, 4)], ids=["whole", "pruned", "all closed"])
def test_an_honest_strategy_is_recognised_and_the_model_stays_as_it_was(strategy, closed):
    model = gated(closed=closed)
    before = models.fingerprint(model)
    assert facts.strategy_sees_the_model(model, ROWS, strategy, seed=0).ok
    assert models.fingerprint(model) == before


@pytest.mark.parametrize("strategy", [name for name in heads.STRATEGIES if name != "random"])
def test_a_strategy_swapped_for_random_fails(strategy, monkeypatch):
    monkeypatch.setitem(heads.STRATEGIES._entries, strategy, heads.STRATEGIES["random"])
    fact = facts.strategy_sees_the_model(gated(), ROWS, strategy, seed=0)
    assert not fact.ok and fact.line().startswith(f"FAILED strategy {strategy} finds a head that was planted dead")


def test_random_swapped_for_a_strategy_that_looks_at_the_model_fails(monkeypatch):
    monkeypatch.setitem(heads.STRATEGIES._entries, "random", heads.STRATEGIES["magnitude"])
    assert not facts.strategy_sees_the_model(gated(), ROWS, "random", seed=0).ok


def test_random_that_does_not_follow_its_seed_fails(monkeypatch):
    monkeypatch.setitem(heads.STRATEGIES._entries, "random", lambda model, rows, seed=0: torch.rand(3, 4))
    assert not facts.strategy_sees_the_model(gated(), ROWS, "random", seed=0).ok


# ------------------------------------------------------------------------------------------ the lowest were closed

PENCIL = [[0.1, 0.9, 0.2, 0.8], [0.3, 0.7, 0.4, 0.05]]


@pytest.mark.parametrize(
    "closed, ok",
    [
        ([(1, 3), (0, 0)], True),
        ([(1, 3), (0, 0), (0, 2)], True),
        ([(1, 3), (0, 2)], False),  # 0.2 went, 0.1 stayed
        ([(0, 1)], False),
        ([], True),
    ],
)
def test_only_the_lowest_scores_may_be_closed(closed, ok):
    assert facts.lowest_scores_were_closed(selection((PENCIL, closed)), False, 0).ok is ok


def test_heads_closed_in_an_earlier_round_or_before_do_not_count_as_spared():
    later = [[0.0, 0.9, 0.2, 0.8], [0.3, 0.7, 0.4, 0.0]]  # closed heads score 0
    assert facts.lowest_scores_were_closed(selection((PENCIL, [(1, 3), (0, 0)]), (later, [(0, 2)])), False, 0).ok
    before = selection((later, [(0, 2)]), closed=[(0, 0), (0, 2), (1, 3)])
    assert facts.lowest_scores_were_closed(before, False, 0).ok
    assert not facts.lowest_scores_were_closed(selection((later, [(0, 2)])), False, 0).ok, "here they were open"


def test_a_head_closed_twice_fails():
    assert not facts.lowest_scores_were_closed(selection((PENCIL, [(1, 3)]), (PENCIL, [(1, 3)])), False, 0).ok


def test_the_order_is_checked_also_where_every_layer_keeps_a_minimum():
    low = [[0.0, 0.1, 0.2, 0.3], [1.0, 1.1, 1.2, 1.3]]
    right = selection((low, [(0, 0), (0, 1), (1, 0)]))
    assert facts.lowest_scores_were_closed(right, False, 2).ok
    assert not facts.lowest_scores_were_closed(right, False, 0).ok, "without a minimum (0, 2) had to go first"
    assert not facts.lowest_scores_were_closed(selection((low, [(0, 0), (0, 1), (1, 1)])), False, 2).ok
    assert not facts.lowest_scores_were_closed(selection((low, [(0, 0), (0, 1), (0, 2)])), False, 2).ok, "one too many"


def test_the_order_is_checked_also_for_whole_groups():
    table = [[0.1, 0.5, 0.9, 0.9], [0.2, 0.2, 0.0, 0.8]]  # means 0.3, 0.9 | 0.2, 0.4
    assert facts.lowest_scores_were_closed(selection((table, [(1, 0), (1, 1)]), group_size=2), True, 0).ok
    assert not facts.lowest_scores_were_closed(selection((table, [(1, 2), (1, 3)]), group_size=2), True, 0).ok
    assert not facts.lowest_scores_were_closed(selection((table, [(1, 0), (1, 2)]), group_size=2), True, 0).ok


OPTIONS = [{}, {"kv_groups": True}, {"min_per_layer": 1}, {"kv_groups": True, "min_per_layer": 2}, {"iterative": True}]


@pytest.mark.parametrize("strategy", heads.STRATEGIES.names())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_prune_chose_is_right_and_the_other_end_of_the_scores_is_not(strategy, options, monkeypatch):
    kv_groups, least = options.get("kv_groups", False), options.get("min_per_layer", 0)
    chosen = heads.prune(gated(closed=[(2, 0), (2, 1)]), ROWS, strategy, 0.5, **options)
    assert facts.lowest_scores_were_closed(chosen, kv_groups, least).ok
    honest = heads.choose
    monkeypatch.setattr(heads, "choose", lambda scores, *rest, **more: honest(-scores, *rest, **more))
    chosen = heads.prune(gated(closed=[(2, 0), (2, 1)]), ROWS, strategy, 0.5, **options)
    assert not facts.lowest_scores_were_closed(chosen, kv_groups, least).ok


# --------------------------------------------------------------------------------------------- closed heads are closed


@pytest.mark.parametrize("name", NAMES)
def test_closed_heads_change_the_logits_and_add_nothing(name):
    model = gated(name)
    before = facts.logits(model, ROWS)
    attention.close_heads(model, CLOSED)
    assert facts.pruning_changed_the_logits(before, facts.logits(model, ROWS), CLOSED).ok
    fact = facts.closed_heads_add_nothing(model, ROWS, CLOSED, "after_pruning")
    assert fact.ok and fact.name == "closed_heads_add_nothing_after_pruning"
    assert fact.values["largest"] == 0 and fact.values["closed"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_that_does_not_reach_the_output_fails_both(name, monkeypatch):
    monkeypatch.setattr(attention, "apply_gate", lambda output, gate: output)
    model = gated(name)
    before = facts.logits(model, ROWS)
    attention.close_heads(model, CLOSED)
    assert not facts.pruning_changed_the_logits(before, facts.logits(model, ROWS), CLOSED).ok
    fact = facts.closed_heads_add_nothing(model, ROWS, CLOSED, "after_pruning")
    assert not fact.ok and fact.values["largest"] > 0
    assert fact.line().startswith("FAILED after pruning: the 3 closed heads add exactly 0")


def test_a_gate_that_lets_a_millionth_through_fails(monkeypatch):
    honest = attention.apply_gate
    monkeypatch.setattr(attention, "apply_gate", lambda output, gate: honest(output, gate.clamp(min=1e-6)))
    assert not facts.closed_heads_add_nothing(gated(closed=CLOSED), ROWS, CLOSED, "after_pruning").ok


@pytest.mark.parametrize("really", [[], CLOSED[:2], [*CLOSED, (2, 2)], [(0, 2), (1, 0), (1, 3)]])
def test_other_heads_closed_than_those_that_were_said_fail(really):
    assert not facts.closed_heads_add_nothing(gated(closed=really), ROWS, CLOSED, "after_pruning").ok


def test_logits_that_stay_though_heads_closed_or_change_though_none_did_fail():
    same, other = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert facts.pruning_changed_the_logits(same, other, CLOSED).ok
    assert facts.pruning_changed_the_logits(same, same, []).ok
    assert not facts.pruning_changed_the_logits(same, same, CLOSED).ok
    assert not facts.pruning_changed_the_logits(same, other, []).ok
    assert not facts.pruning_changed_the_logits(same, other * float("nan"), CLOSED).ok


# ------------------------------------------------------------------------------------------------------- saved models


@pytest.fixture(scope="session")
def tokenizer():
    """Words of two letters: a tokenizer is saved with a model, nothing here is tokenised."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"ab": 0, "cd": 1}, unk_token="ab")))


def saved_facts(folder, tokenizer, name: str = "llama") -> list[facts.Fact]:
    model = gated(name, CLOSED)
    models.save_model(model, tokenizer, folder)
    nll = evaluate.perplexity(model, ROWS).nll
    return facts.saved_model_is_the_same(folder, ROWS, nll, CLOSED, "cpu")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "mixtral"])
def test_a_saved_model_is_the_same_here_and_in_plain_transformers(name, tokenizer, tmp_path):
    found = saved_facts(tmp_path / "model", tokenizer, name)
    assert [fact.ok for fact in found] == [True, True], [fact.line() for fact in found]
    assert [fact.name for fact in found] == ["reloaded_model_is_the_same", "plain_transformers_computes_the_same"]


def test_gates_and_zeroed_columns_dropped_on_save_fail_both(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "save_gates", lambda model, folder: None)
    monkeypatch.setattr(attention, "state_dict_without_closed_heads", lambda model: model.state_dict())
    assert [fact.ok for fact in saved_facts(tmp_path / "model", tokenizer)] == [False, False]


def test_gates_dropped_on_save_fail_the_reloaded_model_alone(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "save_gates", lambda model, folder: None)
    reloaded, plain = saved_facts(tmp_path / "model", tokenizer)
    assert not reloaded.ok and "closed heads differ" in reloaded.saw and plain.ok


def test_columns_that_are_not_zeroed_on_save_fail_plain_transformers_alone(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "state_dict_without_closed_heads", lambda model: model.state_dict())
    reloaded, plain = saved_facts(tmp_path / "model", tokenizer)
    assert reloaded.ok and not plain.ok


def test_a_stop_is_heard_while_the_saved_model_is_scored_here_and_in_plain_transformers(tokenizer, tmp_path):
    folder = models.save_model(gated("llama", CLOSED), tokenizer, tmp_path / "model")
    with pytest.raises(Interrupted, match="stopped after 0 of 2 windows"):
        facts._reloaded(folder, ROWS, 1.0, CLOSED, "cpu", None, lambda: True)
    with pytest.raises(Interrupted, match="stopped after 0 of 2 windows"):
        facts._plain(folder, ROWS, 1.0, "cpu", lambda: True)


# ----------------------------------------------------------------------------------------- text, loss and budget


def corpus(train: list[str], test: list[str]) -> data.Corpus:
    parts = ([data.Document(text) for text in texts] for texts in (train, ["between"], test))
    return data.Corpus(*parts, source="here", generated=False, sha256="0")


def test_a_test_document_in_the_training_or_validation_text_fails():
    assert facts.texts_are_disjoint(corpus(["a", "b"], ["c"])).ok
    fact = facts.texts_are_disjoint(corpus(["a", "b"], ["b", "c", "between"]))
    assert not fact.ok and fact.saw == "2 of 3 shared"


def test_one_prompt_token_in_the_loss_fails():
    assert facts.loss_leaves_out_the_prompt({"prompt_label_tokens": 0, "label_tokens": 40}).ok
    assert not facts.loss_leaves_out_the_prompt({"prompt_label_tokens": 1, "label_tokens": 40}).ok


@pytest.mark.parametrize("steps, tokens, ok", [(10, 500, True), (9, 500, False), (10, 499, False)])
def test_a_control_with_another_number_of_steps_or_tokens_fails(steps, tokens, ok):
    tuned, control = SimpleNamespace(steps=10, label_tokens=500), SimpleNamespace(steps=steps, label_tokens=tokens)
    assert facts.same_budget(tuned, control).ok is ok
