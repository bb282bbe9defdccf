"""Does a plain loop keep its masked weights zero by the callback, and can what is exported be read back?"""

from __future__ import annotations

import pytest
import small_models
import torch
import yaml

from nbhelpers import cerebras, mask_files, masks


@pytest.fixture
def model():
    return small_models.build("llama")


def half(model) -> dict:
    return masks.create(model, masks.weights(model), 0.5, scope="layer", absolute=True).mask(0.5)


def train(model, steps: int, after_step) -> None:
    """AdamW with weight decay on every parameter: momentum and decay move zeros."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = small_models.ids(2, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after_step()


def test_with_the_callback_no_masked_weight_is_alive_after_any_step(model):
    mask = half(model)
    wrapper = cerebras.prepare_sparse_model(model, mask)
    callback, alive = cerebras.SparseMaskCallback(wrapper), []
    train(wrapper, 3, lambda: alive.append((callback.on_step_end(), wrapper.violations())))
    assert all(changed > 0 and left == 0 for changed, left in alive), "each step moved zeros, and each was undone"
    found = callback.report()
    assert found == {
        "steps": 3,
        "steps_with_changes": 3,
        "changed": sum(changed for changed, _ in alive),
        "violations": 0,
    }


def test_without_it_the_zeros_are_gone_after_one_step(model):
    wrapper = cerebras.prepare_sparse_model(model, half(model))
    assert wrapper.violations() == 0
    train(wrapper, 1, lambda: None)
    assert wrapper.violations() > 0


def test_sparse_to_dense_begins_with_the_zeros_and_lets_them_grow(model):
    wrapper = cerebras.prepare_sparse_model(model, half(model), "sparse_to_dense")
    callback = cerebras.SparseMaskCallback(wrapper)
    assert wrapper.violations() == 0
    train(wrapper, 1, callback.on_step_end)
    assert wrapper.violations() > 0 and callback.report()["changed"] == 0


def test_the_wrapper_computes_what_the_masked_model_computes(model):
    mask, ids = half(model), small_models.ids(2, 8)
    wrapper = cerebras.prepare_sparse_model(model, mask)
    other = small_models.build("llama")
    masks.apply(other, mask)
    with torch.no_grad():
        assert torch.equal(wrapper(input_ids=ids).logits, other(input_ids=ids).logits)


def test_the_wrapper_has_the_models_config_and_generates_what_it_generates(model):
    wrapper, ids = cerebras.prepare_sparse_model(model, half(model)), small_models.ids(1, 4)
    assert wrapper.config is model.config
    written = wrapper.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(written, model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
    assert written.shape == (1, 7)


def test_levels_in_place_of_one_mask_and_a_model_in_place_of_its_wrapper_are_refused_with_advice(model, tmp_path):
    levels = masks.create(model, masks.weights(model), [0.1, 0.5], absolute=True)
    advice = r"mask must be .* of one sparsity, got Levels: give levels.mask\(sparsity\), with one of 0.1, 0.5"
    for call in (
        lambda: cerebras.prepare_sparse_model(model, levels),
        lambda: cerebras.create_sparse_config(levels),
        lambda: cerebras.export(tmp_path / "x", model, levels),
    ):
        with pytest.raises(TypeError, match=advice):
            call()
    with pytest.raises(TypeError, match="mask must be .* of one sparsity, got str"):
        cerebras.prepare_sparse_model(model, "masks.pt")
    with pytest.raises(TypeError, match="got LlamaForCausalLM: give what prepare_sparse_model returned"):
        cerebras.SparseMaskCallback(model)


def test_what_is_exported_can_be_read_back_and_names_what_was_not_tried(model, tmp_path):
    mask = half(model)
    folder = cerebras.export(tmp_path / "cs3", model, mask, steps=10, learning_rate=1e-4)
    files = [mask_files.load(folder / f"masks.{suffix}", model) for suffix in ("pt", "safetensors")]
    assert files[0].sha256 == files[1].sha256
    assert all(torch.equal(files[0].levels.kept(name), kept) for name, kept in mask.items())
    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    assert "not tried on a CS-3" in config["note"] and config["training"] == {"steps": 10, "learning_rate": 1e-4}
    assert config["initial_zeros"]["sha256"] == files[0].sha256
    shares = {group["params"]: group["sparsity"] for group in config["sparsity"]["groups"]}
    assert set(shares) == set(mask) and all(share == pytest.approx(0.5, abs=0.01) for share in shares.values())
    assert cerebras.create_sparse_config(mask, "sparse_to_dense")["sparsity"]["groups"] == []


def test_a_mask_for_another_model_and_an_unknown_mode_are_refused_and_touch_nothing(model, tmp_path):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="names of the mask are not exactly"):
        cerebras.prepare_sparse_model(model, {"other": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="mode must be sparse_to_dense or sparse_to_sparse, got 'dense'"):
        cerebras.prepare_sparse_model(model, half(model), "dense")
    with pytest.raises(ValueError, match="names of the mask"):
        cerebras.export(tmp_path / "x", model, {"other": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="got 'sparse-to-sparse'"):
        cerebras.create_sparse_config(half(model), "sparse-to-sparse")
    with pytest.raises(ValueError, match="got 'sparse-to-sparse'"):
        cerebras.export(tmp_path / "x", model, half(model), "sparse-to-sparse")
    assert not (tmp_path / "x").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
