"""Do rows that share a sequence lose what each loses alone, and is there less padding?"""

from __future__ import annotations

import pytest
import small_models
import torch

from nbhelpers import attention, data, losses, packing


def rows(lengths=(9, 4, 5, 3, 2, 7)) -> list[dict]:
    """Rows of random tokens whose last half is labelled."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for length in lengths:
        ids = torch.randint(0, small_models.VOCABULARY, (length,), generator=generator)
        made.append({"input_ids": ids, "labels": data.mask_prompt(ids, length // 2)})
    return made


def lengths(sequences) -> list[list[int]]:
    return [[len(row["input_ids"]) for row in sequence] for sequence in sequences]


def gated(name: str) -> torch.nn.Module:
    model = small_models.build(name)
    attention.install(model)
    return model


def test_the_longest_rows_come_first_and_each_goes_where_it_first_fits():
    assert lengths(packing.together(rows())) == [[9], [7, 2], [5, 4], [3]]
    assert lengths(packing.together(rows((4, 4, 4)))) == [[4], [4], [4]]


@pytest.mark.parametrize("name", [name for name in small_models.NAMES if name != "mistral_window"])
def test_packed_rows_lose_what_they_lose_alone_and_have_the_same_gradients(name):
    model, given = gated(name), rows()
    parameters = [p for p in model.parameters() if p.requires_grad]
    alone = sum(losses.nll_sum(model, data.collate([row])) for row in given)
    wanted = torch.autograd.grad(alone, parameters, allow_unused=True)
    batch = packing.collate(packing.together(given))
    packed = losses.nll_sum(model, batch)
    got = torch.autograd.grad(packed, parameters, allow_unused=True)
    assert batch["input_ids"].shape == (4, 9) and batch["attention_mask"].shape == (4, 1, 9, 9)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_a_row_never_sees_another_and_starts_at_position_0():
    first, second = rows((4, 3))
    batch = packing.collate([[first, second], rows((9,))])
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0]
    mask = batch["attention_mask"][0, 0].int().tolist()
    assert mask[3] == [1, 1, 1, 1, 0, 0, 0, 0, 0] and mask[4] == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert mask[6] == [0, 0, 0, 0, 1, 1, 1, 0, 0] and mask[8] == [0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_a_rows_first_token_is_not_predicted_by_the_row_before_it():
    plain = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows((9, 4, 5))]
    batch = packing.collate(packing.together(plain))
    assert (batch["labels"][:, 1:] != data.IGNORED).sum() == 8 + 3 + 4
    assert batch["labels"][1].tolist()[5] == data.IGNORED


def test_rows_of_one_length_stay_as_they_are_without_a_mask():
    batch = packing.collate(packing.together(rows((6, 6, 6))))
    assert set(batch) == {"input_ids", "labels", "attention_mask"} and batch["attention_mask"].ndim == 2


def test_packing_is_off_where_rows_could_see_each_other_and_says_why():
    assert packing.why_not(gated("llama"), 60) is None
    assert "not known here" in packing.why_not(small_models.build("llama"), 60)
    windowed = gated("mistral_window")
    assert packing.why_not(windowed, small_models.WINDOW) is None
    assert packing.why_not(windowed, 60) == "the model attends within 5 tokens and rows have up to 60"


@pytest.mark.parametrize("packed", [True, False])
def test_the_check_compares_with_the_models_own_logits(packed):
    found = packing.loss_check(gated("gpt2"), rows(), packed)
    assert found["ours"] == pytest.approx(found["own"], rel=1e-5)
    assert (found["rows"], found["tokens"]) == (2, 3)


def test_the_check_sees_rows_that_look_at_each_other(monkeypatch):
    collate = packing.collate

    def open_mask(sequences, device="cpu"):
        batch = collate(sequences, device)
        length = batch["input_ids"].shape[1]
        batch["attention_mask"] = torch.ones(length, length, dtype=torch.bool).tril().expand(1, 1, -1, -1)
        return batch

    monkeypatch.setattr(packing, "collate", open_mask)
    monkeypatch.setattr(packing, "together", lambda given: [list(given)])
    found = packing.loss_check(gated("llama"), rows((9, 8)), True)
    assert abs(found["ours"] - found["own"]) > 1e-3
