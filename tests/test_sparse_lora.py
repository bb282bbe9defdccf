"""Does a pruned model stay pruned through LoRA, does merging give the model that was trained, and is a fault seen?"""

from __future__ import annotations

import copy

import pytest
import small_models
import torch
import torch.nn.functional as F

from nbhelpers import (
    adapters,
    faster_layers,
    mask_files,
    masked_adapters,
    masked_training,
    masks,
    models,
    optimization,
    preparation,
    quantization,
    runtime,
    sparse_lora,
)
from nbhelpers.training import TrainingConfig, fine_tune

IDS = small_models.ids(3, 12)
ROW = {"input_ids": IDS[0]}
S2S, S2D = "sparse_to_sparse", "sparse_to_dense"
PLACES = {  # one projection of each architecture and the number of all of them, by hand
    "gpt2": ("transformer.h.0.attn.c_attn.weight", 8),
    "llama": ("model.layers.0.self_attn.q_proj.weight", 21),
    "mixtral": ("model.layers.0.mlp.experts.gate_up_proj", 12),
    "phi3": ("model.layers.1.mlp.gate_up_proj.weight", 8),
}


def names(model) -> list[str]:
    """Every projection, by its name alone."""
    parts = ("attn", "mlp", "attention", "experts")
    found = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    return [name for name in found if any(part in name for part in parts) and ".mlp.gate." not in name]


def random_mask(model, kept: float = 0.5, seed: int = 1) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(name).shape for name in names(model)}
    return {name: torch.rand(shape, generator=drawn) < kept for name, shape in shapes.items()}


def adapted(model, mask, mode, *, dropout: float = 0.0, targets=None):
    """With adapters that are not zero."""
    put = sparse_lora.put_on(model, mask, mode, rank=3, alpha=6.0, dropout=dropout, targets=targets, seed=0)
    stir(put)
    return put.eval()


def stir(model) -> None:
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) / 6)


def logits(model, ids=IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def by_hand(name: str, adapted_model, mask) -> torch.nn.Module:
    """The same model without PEFT, each weight written as W + 2 (B A) . M from the factors by the book."""
    plain, state = small_models.build(name), adapted_model.state_dict()
    with torch.no_grad():
        for key, kept in mask.items():
            weight, path = plain.get_parameter(key), f"base_model.model.{key.removesuffix('.weight')}"
            down, up = state[f"{path}.lora_A.default.weight"], state[f"{path}.lora_B.default.weight"]
            added = up @ down
            weight.copy_((weight + 2.0 * (added.t() if name == "gpt2" else added)) * kept)
    return plain


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_every_projection_computes_w_plus_the_masked_delta(name):
    model = small_models.build(name)
    mask = random_mask(model)
    assert PLACES[name][0] in mask and len(mask) == PLACES[name][1]
    put = adapted(model, mask, S2S)
    wanted = logits(by_hand(name, put, mask))
    torch.testing.assert_close(logits(put), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_factors_are_those_of_the_dense_formula(name, checkpointing):
    """Against a copy whose layers are computed by autograd from W + s (B A) * M written out."""
    dtype = torch.float32 if name == "mixtral" else torch.float64  # torch has no grouped product in float64
    model = small_models.build(name).to(dtype)
    put = adapted(model, random_mask(model), S2S)
    mask = masked_adapters.stored_mask(put)
    trained = [parameter for parameter in put.parameters() if parameter.requires_grad]
    layers = masked_adapters.layers(put)

    def whole():
        out = {}
        for key, layer in layers.items():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if key.endswith("proj") and name == "mixtral":
                experts = layer.num_experts
                up = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
                added = up @ down.reshape(experts, -1, down.shape[-1])
            else:
                added = (up @ down).t() if name == "gpt2" else up @ down
            out[key] = masked_adapters.base_parameter(layer) + 2.0 * added * mask.kept(key)
        return out

    plain = small_models.build(name).to(dtype)
    loss = torch.func.functional_call(plain, whole(), (), {"input_ids": IDS}).logits.logsumexp(-1).square().mean()
    wanted = torch.autograd.grad(loss, trained)
    if checkpointing:
        put.train()
        preparation._checkpoint_activations(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    got = torch.autograd.grad(put(input_ids=IDS, use_cache=False).logits.logsumexp(-1).square().mean(), trained)
    for one, other in zip(got, wanted, strict=True):
        close = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(one, other, rtol=10 * close, atol=close * other.abs().max().item())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_merged_and_unmerged_logits_are_equal_no_zero_is_filled_and_unmerging_is_exact(name):
    model = small_models.build(name)
    mask = random_mask(model)
    put = adapted(model, mask, S2S)
    before = {key: tensor.clone() for key, tensor in put.state_dict().items()}
    unmerged = logits(put)
    report = sparse_lora.merge(put, ROW)
    assert report.ok and report.layers == report.masked_layers == PLACES[name][1]
    assert report.violations == 0 and report.difference <= 1e-5
    assert {fact.name for fact in report.facts} >= {"merged_model_computes_the_same"} and len(report.facts) == 3
    torch.testing.assert_close(logits(put), unmerged, rtol=1e-4, atol=1e-5 * unmerged.abs().max().item())
    assert sparse_lora.unmerge(put) == report.layers
    after = put.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before) and torch.equal(logits(put), unmerged)


def test_after_unloading_the_merged_weights_stay_with_exactly_the_zeros_of_the_mask():
    model = small_models.build("llama")
    mask = random_mask(model, kept=0.3)
    put = adapted(model, mask, S2S)
    merged = sparse_lora.merge(put, ROW)
    adapters.unload(model)
    assert not adapters.are_on(model) and merged.ok and sum(sparse_lora.violations(model).values()) == 0
    for key, kept in mask.items():
        assert torch.equal(model.get_parameter(key) != 0, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_keep_their_zeros_and_their_function(dtype):
    model = small_models.build("llama").to(dtype)
    mask = random_mask(model)
    report = sparse_lora.merge(adapted(model, mask, S2S), ROW)
    assert report.ok and report.violations == 0
    assert report.difference == 0, "forward computes with the rounded sum that merging writes"
    assert all((model.get_submodule(key[:-7]).get_base_layer().weight[~kept] == 0).all() for key, kept in mask.items())


def test_float32_weights_cast_down_after_merging_keep_their_zeros():
    model = small_models.build("llama")
    put = adapted(model, random_mask(model), S2S)
    sparse_lora.merge(put, ROW)
    adapters.unload(model)
    assert set(sparse_lora.violations(model.to(torch.float16)).values()) == {0}


def test_sparse_to_sparse_differs_from_sparse_to_dense_and_merging_the_latter_fills_the_zeros():
    outs, reports = [], []
    for mode in (S2S, S2D):
        model = small_models.build("llama")
        mask = random_mask(model)
        put = adapted(model, mask, mode)
        outs.append(logits(put))
        reports.append(sparse_lora.merge(put, ROW))
    assert (outs[0] - outs[1]).abs().max() > 0.1 * outs[0].abs().max()
    assert [report.ok for report in reports] == [True, True]
    assert reports[0].violations == 0
    assert reports[1].violations == sum(int((~kept).sum()) for kept in mask.values())
    assert 0.5 < reports[0].withheld < 0.9 and reports[1].withheld == 0  # half of the numbers: about 1 / sqrt 2


def test_both_sparse_modes_begin_with_masked_weights_and_the_function_of_the_masked_model():
    for mode in (S2S, S2D):
        model, plain = small_models.build("gpt2"), small_models.build("gpt2")
        mask = random_mask(model)
        put = sparse_lora.put_on(model, mask, mode, rank=2, alpha=4.0, seed=0).eval()
        with torch.no_grad():
            for key, kept in mask.items():
                plain.get_parameter(key).mul_(kept)
        torch.testing.assert_close(logits(put), logits(plain))


def test_dense_mode_is_plain_lora_of_the_same_seed():
    config = TrainingConfig(method="lora", lora_rank=3, lora_alpha=6.0)
    with runtime.seeded(0):
        wanted = preparation.with_adapters(small_models.build("llama"), config).state_dict()
    put = sparse_lora.put_on(small_models.build("llama"), None, "dense", rank=3, alpha=6.0, seed=0)
    got = put.state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in got)
    stir(put)
    report = sparse_lora.merge(put, ROW)
    assert report.ok and report.masked_layers == report.violations == 0 and report.mode == "dense"


def test_steps_of_adamw_with_weight_decay_revive_nothing():
    model = small_models.build("llama")
    put = sparse_lora.put_on(model, random_mask(model), S2S, rank=3, alpha=6.0, seed=0).train()
    frozen = {key: p.clone() for key, p in put.named_parameters() if not p.requires_grad}
    trained = {key: p for key, p in put.named_parameters() if p.requires_grad}
    optimizer = optimization.adamw(trained, 1e-2, 0.5, torch.device("cpu"))
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(logits(put)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[key]) for key, p in put.named_parameters() if key in frozen)
    report = sparse_lora.merge(put, ROW)
    assert report.ok and report.withheld > 0.1


def test_dropout_is_on_the_adapters_input_alone_and_off_in_evaluation():
    model = small_models.build("llama")
    mask = random_mask(model)
    put = adapted(model, mask, S2S, dropout=0.5)
    layer = masked_adapters.layers(put)[PLACES["llama"][0]]
    x = torch.randn(2, 5, 32)
    whole = masked_adapters.merged_weight(layer)
    torch.testing.assert_close(layer(x), F.linear(x, whole), rtol=1e-4, atol=1e-4)
    layer.train()
    with runtime.seeded(3):
        got = layer(x)
    with runtime.seeded(3):
        dropped = F.dropout(x, 0.5)
    added = masked_adapters.delta(layer) * mask[PLACES["llama"][0]]
    torch.testing.assert_close(got, layer.base_layer(x) + F.linear(dropped, added), rtol=1e-4, atol=1e-4)


def test_the_slow_way_by_pefts_hook_and_the_fast_one_compute_the_same():
    model = small_models.build("gpt2")
    put = adapted(model, random_mask(model), S2S)
    fast, seen = logits(put), []
    for layer in masked_adapters.layers(put).values():
        layer.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(put), fast, rtol=1e-4, atol=1e-5)
    assert len(seen) == 8, "a hook on the base layer sees its own result"


def test_autocast_computes_in_its_own_precision():
    model = small_models.build("llama")
    put = adapted(model, random_mask(model), S2S)
    exact = logits(put)
    with torch.autocast("cpu", torch.bfloat16):
        layer = masked_adapters.layers(put)[PLACES["llama"][0]]
        assert layer(torch.randn(2, 32)).dtype == torch.bfloat16
        assert (logits(put) - exact).abs().max() < 0.1 * exact.abs().max()


def test_disabling_the_adapter_gives_the_masked_model_and_faster_layers_leave_it_alone():
    model = small_models.build("llama")
    put = adapted(model, random_mask(model), S2S)
    with put.disable_adapter():
        without = logits(put)
    adapters_off = copy.deepcopy(model)
    adapters.unload(adapters_off)
    torch.testing.assert_close(without, logits(adapters_off))
    with faster_layers.in_use(put, "fp32") as changed:
        assert changed == 0


def test_some_targets_can_be_left_out_and_stay_masked():
    model = small_models.build("llama")
    mask = random_mask(model)
    targets = [name for name in mask if "q_proj" in name]
    put = adapted(model, mask, S2S, targets=targets)
    assert set(masked_adapters.layers(put)) == set(targets)
    report = sparse_lora.merge(put, ROW)
    assert report.ok and (report.layers, report.masked_layers) == (3, 21)


# What is refused ------------------------------------------------------------------------------------------------------


def spoilt_masks():
    name = PLACES["llama"][0]
    good = torch.ones(32, 32, dtype=torch.bool)
    return [
        ({"model.layers.0.self_attn.qproj.weight": good}, LookupError, "unknown parameter in the mask .*Did you mean"),
        ({name: good[:4]}, ValueError, r"must be bool of shape \(32, 32\), got torch.bool of \(4, 32\)"),
        ({name: good.float()}, ValueError, "must be bool of shape .*got torch.float32"),
        (
            {"model.embed_tokens.weight": torch.ones(64, 32, dtype=torch.bool)},
            ValueError,
            "LoRA does not know Embedding",
        ),
    ]


@pytest.mark.parametrize("mask, error, message", spoilt_masks())
def test_a_mask_that_does_not_fit_is_refused_before_anything_is_touched(mask, error, message):
    model = small_models.build("llama")
    before = models.fingerprint(model)
    with pytest.raises(error, match=message):
        sparse_lora.put_on(model, mask, S2S, rank=2, alpha=2.0, seed=0)
    assert models.fingerprint(model) == before and not adapters.are_on(model)


@pytest.mark.parametrize(
    "mode, with_mask, message",
    [
        ("dense", True, "mode 'dense' takes no mask"),
        (S2S, False, "mode 'sparse_to_sparse' needs a mask"),
        ("sparse", True, "unknown mode 'sparse'. Available: dense, sparse"),
    ],
)
def test_a_mode_and_a_mask_that_contradict_are_refused(mode, with_mask, message):
    model = small_models.build("llama")
    with pytest.raises(ValueError, match=message):
        sparse_lora.put_on(model, random_mask(model) if with_mask else None, mode, rank=2, alpha=2.0, seed=0)


def test_experts_with_dropout_are_refused_by_name_with_their_share():
    model = small_models.build("mixtral")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj \(\d+.\d% of the targets\) .*dropout, set it to 0"):
        sparse_lora.put_on(model, random_mask(model), S2S, rank=2, alpha=2.0, dropout=0.1, seed=0)


def test_merging_twice_unmerging_twice_and_putting_on_twice_are_refused():
    model = small_models.build("llama")
    mask = random_mask(model)
    put = adapted(model, mask, S2S)
    with pytest.raises(ValueError, match="not merged; nothing to put back"):
        sparse_lora.unmerge(put)
    sparse_lora.merge(put, ROW)
    with pytest.raises(ValueError, match="merged already; unmerge them first"):
        sparse_lora.merge(put, ROW)
    with pytest.raises(ValueError, match="carries adapters already"):
        sparse_lora.put_on(model, mask, S2S, rank=2, alpha=2.0, seed=0)
    sparse_lora.unmerge(put)
    assert sparse_lora.merge(put, ROW).ok
    with pytest.raises(ValueError, match="carries no adapters to merge"):
        sparse_lora.merge(small_models.build("llama"), ROW)


def test_broken_adapters_are_not_merged_and_nothing_is_left_half_done():
    model = small_models.build("llama")
    put = adapted(model, random_mask(model), S2S)
    last = list(masked_adapters.layers(put).values())[-1]
    with torch.no_grad():
        last.lora_B["default"].weight[0] = torch.nan
    before = models.fingerprint(model)
    with pytest.raises(ValueError, match="not finite: the adapters are broken"):
        sparse_lora.merge(put, ROW)
    assert models.fingerprint(model) == before
    assert not any(layer.merged for layer in masked_adapters.layers(put).values())


# Saboteurs: the proof itself must say FAILED --------------------------------------------------------------------------


def failed(report) -> set[str]:
    return {fact.name for fact in report.facts if not fact.ok}


def test_pefts_own_merge_in_place_of_ours_is_reported(monkeypatch):
    model = small_models.build("llama")
    mask = random_mask(model)
    put = adapted(model, mask, S2S)

    def as_peft_does(layer):
        return layer.get_base_layer().weight + layer.get_delta_weight("default")

    monkeypatch.setattr(masked_adapters, "merged_weight", as_peft_does)
    report = sparse_lora.merge(put, ROW)
    assert failed(report) == {"merged_model_computes_the_same", "masked_weights_are_zero_after_merging"}
    assert report.violations == sum(int((~kept).sum()) for kept in mask.values()), "every zero is filled"


def test_a_mask_dropped_in_every_forward_pass_is_reported(monkeypatch):
    put = adapted(model := small_models.build("llama"), random_mask(model), S2S)
    unmasked = masked_adapters.Linear.forward
    for layer in masked_adapters.layers(put).values():
        layer.lora_variant.clear()
        monkeypatch.setattr(type(layer), "forward", unmasked)
    report = sparse_lora.merge(put, ROW)
    assert failed(report) == {"merged_model_computes_the_same"} and report.violations == 0


def test_a_layer_that_lost_its_mask_or_has_another_one_is_reported():
    put = adapted(model := small_models.build("llama"), random_mask(model), S2S)
    first, second, *_ = masked_adapters.layers(put).values()
    first.kept_bits[0, 0] ^= 1
    second.kept_bits.fill_(255)
    report = sparse_lora.merge(put, ROW)
    assert failed(report) == {"masked_weights_are_zero_after_merging", "deltas_were_masked_by_the_stored_mask"}
    assert report.facts[2].values["others"] == list(masked_adapters.layers(put))[:2]


def test_a_base_weight_that_came_alive_is_reported():
    put = adapted(model := small_models.build("llama"), mask := random_mask(model), S2S)
    name = PLACES["llama"][0]
    at = tuple((~mask[name]).nonzero()[0])
    with torch.no_grad():
        masked_adapters.base_parameter(masked_adapters.layers(put)[name])[at] = torch.tensor(0.01)
    report = sparse_lora.merge(put, ROW)
    assert failed(report) == {"masked_weights_are_zero_after_merging"} and report.violations == 1


def test_a_proof_over_zero_layers_fails():
    assert not sparse_lora._stayed_zero({}).ok
    assert not sparse_lora._computes_the_same(0.0, 1e-5, 0).ok


def test_pefts_private_hooks_are_where_we_use_them():
    """A new PEFT that moves them fails here first."""
    from inspect import signature

    from peft.tuners.lora import layer as peft_layer

    given = {"init": 2, "forward": 4, "merge_safe": 3, "merge_unsafe": 3, "unmerge": 3}
    for name, count in given.items():
        assert len(signature(getattr(peft_layer.LoraVariant, name)).parameters) >= count
    put = adapted(model := small_models.build("gpt2"), random_mask(model), S2S)
    layer = next(iter(masked_adapters.layers(put).values()))
    for part in ("lora_variant", "merged_adapters", "active_adapters", "disable_adapters", "scaling", "lora_dropout"):
        assert hasattr(layer, part)
    assert {"_activate_lora", "_remove_parametrizations", "get_param"} <= set(dir(peft_layer.ParamWrapper))


@pytest.mark.parametrize("safe", [True, False])
def test_pefts_own_way_to_merge_goes_through_the_mask_too_and_back_exactly(safe):
    put = adapted(model := small_models.build("gpt2"), mask := random_mask(model), S2S)
    before = models.fingerprint(model)
    put.merge_adapter(safe_merge=safe)
    for name, layer in masked_adapters.layers(put).items():
        assert (masked_adapters.base_parameter(layer)[~mask[name]] == 0).all()
    put.unmerge_adapter()
    assert models.fingerprint(model) == before


@pytest.mark.parametrize("way", ["ours", "peft", "peft, safe"])
def test_what_merging_keeps_is_moved_to_the_cpu_and_stands_not_beside_the_merged_weights(way, monkeypatch):
    """On a GPU both would be twice the weights. A CPU tensor is its own copy, so moving is made to be seen here."""
    put = adapted(model := small_models.build("llama"), random_mask(model), S2S)
    moved, own = [], torch.Tensor.cpu

    def to_cpu(tensor):
        moved.append(own(tensor).clone())
        return moved[-1]

    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    sparse_lora.merge(put, ROW) if way == "ours" else put.merge_adapter(safe_merge="safe" in way)
    kept = [layer.kept_base for layer in masked_adapters.layers(put).values()]
    assert len(kept) == 21 and {id(one) for one in kept} <= {id(one) for one in moved}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_merged_model_takes_the_memory_of_one_model():
    model = small_models.build("llama").to("cuda")
    put = adapted(model, random_mask(model), S2S)
    sparse_lora.merge(put, ROW)  # what the first products take for good
    sparse_lora.unmerge(put)
    before = torch.cuda.memory_allocated()
    assert sparse_lora.merge(put, ROW).ok
    weights = sum(masked_adapters.base_parameter(one).nbytes for one in masked_adapters.layers(put).values())
    assert torch.cuda.memory_allocated() - before < weights / 2


# Files ----------------------------------------------------------------------------------------------------------------


def trained_tiny(mode: str):
    model = models.load_model("tiny-llama", device="cpu", dtype="float32").model
    return adapted(model, random_mask(model), mode)


@pytest.mark.parametrize("mode", [S2S, S2D])
def test_saved_adapters_come_back_with_their_mask_and_give_the_same_logits(mode, tmp_path):
    put = trained_tiny(mode)
    sparse_lora.save(put, tmp_path / "adapters")
    written = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_mask.safetensors"} <= written
    fresh = models.load_model("tiny-llama", device="cpu", dtype="float32").model
    again = sparse_lora.load(fresh, tmp_path / "adapters")
    assert torch.equal(logits(again), logits(put))
    report = sparse_lora.merge(again, ROW)
    assert report.ok and report.mode == mode and (report.violations == 0) == (mode == S2S)
    with pytest.raises(FileExistsError, match="not empty"):
        sparse_lora.save(put, tmp_path / "adapters")


def test_a_mask_file_that_was_changed_or_cut_or_is_for_another_model_is_refused(tmp_path):
    put = trained_tiny(S2S)
    path = sparse_lora.save(put, tmp_path / "adapters") / adapters.MASK
    whole, kept = path.read_bytes(), masked_adapters.stored_mask(put)
    fresh = models.load_model("tiny-llama", device="cpu", dtype="float32").model
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content in (bytes(flipped), whole[:-5], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="adapter_mask.safetensors' is refused"):
            sparse_lora.load(fresh, path.parent)
    path.write_bytes(whole)
    with pytest.raises(LookupError, match="unknown parameter in the mask"):
        sparse_lora.load(small_models.build("gpt2"), path.parent)
    mask = {name: kept.kept(name) for name in kept.bits}
    mask_files.save(path, masks.pack(mask), importance=None, mode="other")
    with pytest.raises(ValueError, match="unknown mode 'other'"):
        sparse_lora.load(fresh, path.parent)
    assert not adapters.are_on(fresh)


def test_merged_adapters_are_not_saved(tmp_path):
    put = trained_tiny(S2S)
    sparse_lora.merge(put, ROW)
    with pytest.raises(ValueError, match="are merged: unmerge them first"):
        sparse_lora.save(put, tmp_path / "adapters")
    assert list(tmp_path.iterdir()) == []


# 4-bit ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory):
    """(tiny-llama with every second weight zero, as `masks apply` saves it; its mask)."""
    pytest.importorskip("bitsandbytes")
    loaded, folder = models.load_model("tiny-llama", device="cpu", dtype="stored"), tmp_path_factory.mktemp("masked")
    masks.apply(loaded.model, mask := random_mask(loaded.model))
    models.save_model(loaded.model, loaded.tokenizer, folder)
    return str(folder), mask


def in_4_bits(name: str):
    return models.load_model(name, device="cpu", dtype="float32", quantization="4bit").model


def test_on_4_bit_weights_masked_before_the_delta_alone_is_masked_trained_saved_and_never_merged(
    masked_folder, tmp_path
):
    folder, mask = masked_folder
    put = adapted(in_4_bits(folder), mask, S2S)
    layer = masked_adapters.layers(put)[PLACES["llama"][0]]
    x = torch.randn(4, layer.in_features, requires_grad=True)
    added = masked_adapters.delta(layer) * masked_adapters.kept_by(layer)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + F.linear(x, added), rtol=1e-4, atol=1e-4)
    loss = logits(put).logsumexp(-1).square().mean()
    trained = [parameter for parameter in put.parameters() if parameter.requires_grad]
    assert all(slope.abs().sum() > 0 for slope in torch.autograd.grad(loss, trained))
    with pytest.raises(ValueError, match="dequantise the model first, or keep the adapters"):
        sparse_lora.merge(put, ROW)
    with pytest.raises(ValueError, match="dequantise the model first"):
        put.merge_adapter()
    sparse_lora.save(put, tmp_path / "adapters")
    assert torch.equal(logits(sparse_lora.load(in_4_bits(folder), tmp_path / "adapters")), logits(put))


@pytest.mark.parametrize("mode", [S2S, S2D])
def test_4_bit_weights_that_nobody_masked_are_refused_and_nothing_is_put_on_them(mode, masked_folder, tmp_path):
    folder, mask = masked_folder
    model = in_4_bits("tiny-llama")
    name = PLACES["llama"][0]
    said = rf"of {int((~mask[name]).sum()):,} weights that the mask leaves out of {name} are not zero.*masks apply"
    with pytest.raises(ValueError, match=said):
        sparse_lora.put_on(model, {name: mask[name]}, mode, rank=3, alpha=6.0, seed=0)
    sparse_lora.save(adapted(in_4_bits(folder), mask, mode), tmp_path / "adapters")
    with pytest.raises(ValueError, match="are not zero.*masks apply"):
        sparse_lora.load(model, tmp_path / "adapters")
    assert not adapters.are_on(model) and masked_adapters.stored_mask(model) is None


def test_adapters_trained_on_masked_4_bit_weights_compute_the_same_on_float_ones_of_the_rounded_values(
    masked_folder, tmp_path
):
    folder, mask = masked_folder
    put = sparse_lora.put_on(in_4_bits(folder), mask, S2S, rank=3, alpha=6.0, seed=0)
    optimizer = torch.optim.AdamW([one for one in put.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(2):  # the second one moves both factors
        put(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    put.eval()
    assert len(found := sparse_lora.violations(put)) == len(mask) and not any(found.values())
    sparse_lora.save(put, tmp_path / "adapters")
    rounded = models.load_model(folder, device="cpu", dtype="float32").model
    with torch.no_grad():
        untrained = logits(in_4_bits(folder))
        for path, module in in_4_bits(folder).named_modules():
            if type(module).__name__ == "Linear4bit":
                rounded.get_submodule(path).weight.copy_(quantization.dequantised(module))
        again = logits(sparse_lora.load(rounded, tmp_path / "adapters"))
        wanted = logits(put)
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert (wanted - untrained).norm() > 0.01 * untrained.norm(), "and they were trained"


def test_rows_that_are_zero_as_a_whole_are_exactly_zero_in_4_bits_whatever_their_blocks(masked_folder, tmp_path):
    loaded = models.load_model("tiny-llama", device="cpu", dtype="stored")
    mask = {name: torch.ones(loaded.model.get_parameter(name).shape, dtype=torch.bool) for name in names(loaded.model)}
    for kept in mask.values():
        kept[1::2] = False
    masks.apply(loaded.model, mask)
    models.save_model(loaded.model, loaded.tokenizer, tmp_path / "rows")
    put = sparse_lora.put_on(in_4_bits(str(tmp_path / "rows")), mask, S2S, rank=3, alpha=6.0, seed=0)
    assert sum(sparse_lora.violations(put).values()) == 0
    layer = masked_adapters.layers(put)[PLACES["llama"][0]].get_base_layer()
    layer.weight.data = layer.weight.data ^ 0x11  # other codes
    assert sparse_lora.violations(put)[PLACES["llama"][0]] > 0, "and what comes alive is counted"


# In a training run, and on a real model -------------------------------------------------------------------------------


def rows_of(model, count: int = 6) -> list[dict]:
    ids = torch.randint(3, 60, (count, 20), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_fine_tuning_trains_masked_adapters_and_gives_back_a_model_with_its_zeros(name, tmp_path):
    model = models.load_model(name, device="cpu", dtype="float32").model
    mask = random_mask(model, kept=0.4)
    whole = {key: model.get_parameter(key).clone() for key in mask}
    settings = {"method": "lora", "steps": 4, "batch_size": 3, "learning_rate": 1e-2, "weight_decay": 0.5}
    rows = rows_of(model)
    config = TrainingConfig(**settings, eval_every=2)
    result = fine_tune(model, rows, rows[:2], config, output_dir=tmp_path, sparse=(mask, S2S))
    assert result.model is model and not adapters.are_on(model)
    assert result.validation_nlls[-1][1] < result.validation_nlls[0][1] and result.merge_difference <= 1e-5
    assert all(fact["ok"] for fact in result.merged["facts"]) and result.merged["withheld"] > 0.1
    for key, kept in mask.items():
        weight = model.get_parameter(key)
        assert (weight[~kept] == 0).all() and not torch.equal(weight[kept], whole[key][kept])


def test_on_a_real_model_pruned_by_magnitude_the_proof_holds_and_pefts_merge_would_fill_every_zero(data_dir):
    model = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype="float32").model
    weights = {name: model.get_parameter(name).abs() for name in names(model)}
    mask = {name: weight > weight.median() for name, weight in weights.items()}
    put = adapted(model, mask, S2S)
    report = sparse_lora.merge(put, ROW)
    assert report.ok and report.violations == 0 and report.layers == len(mask) >= 35
    sparse_lora.unmerge(put)
    for layer in masked_adapters.layers(put).values():
        weight = layer.get_base_layer().weight
        weight.data = weight.data + layer.get_delta_weight("default")  # as PEFT's own merge does
    filled = sparse_lora.violations(put)
    assert sum(filled.values()) == sum(int((~kept).sum()) for kept in mask.values())


# The benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(project_dir):
    import importlib.util

    spec = importlib.util.spec_from_file_location("sparse_lora_benchmark", project_dir / "benchmarks/sparse_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmarks_ratios_are_taken_round_by_round_and_a_broken_promise_is_said(benchmark):
    def cell(tokens, ours):
        rounds = {benchmark.PLAIN: [1.0, 2.0, 1.0], benchmark.TEXTBOOK: [2.0, 2.0, 2.0], benchmark.OURS: ours}
        return {"inputs": 8, "outputs": 16, "tokens": tokens, "rounds": rounds, "gradients_differ": 1e-6}

    taken = {
        name: [{"before": 100, "peak": 100 + grown}] for name, grown in zip(benchmark.WAYS, (50, 90, 60), strict=True)
    }
    memory = {"inputs": 8, "outputs": 16, "tokens": 64, "rounds": taken}
    machine = dict.fromkeys(("processor", "device", "threads", "precision", "torch", "peft"), "x")
    measured = {"cells": [cell(8, [9.0, 9.0, 9.0]), cell(64, [3.0, 3.0, 2.5])], "memory": [memory], "rounds": 3}
    found = benchmark.summarise(measured | {"machine": machine})
    assert found["cells"][1]["ratio"][benchmark.OURS] == {"median": 2.5, "low": 1.5, "high": 3.0}
    assert found["memory"][0]["ratio"][benchmark.OURS]["median"] == pytest.approx(1.2)
    assert [one["met"] for one in found["targets"]] == [False, True, True], "at the most tokens alone"
    said = benchmark.markdown(found)
    assert said.count("NOT met.") == 1 and said.count(": met.") == 2


def test_the_benchmarks_three_ways_do_the_same_step(benchmark):
    found = benchmark.speed(24, 40, 6, rounds=1, seconds=0.001)
    assert found["gradients_differ"] < 1e-5
    plain, slope = benchmark.plain(24, 40), benchmark.data(24, 40, 6)
    masked = benchmark.ours(24, 40)
    other = benchmark.step(*masked, *slope)[1].clone()
    assert not torch.allclose(benchmark.step(*plain, *slope)[1], other), "without a mask it is another one"


def test_adapters_that_respect_a_mask_are_neither_loaded_nor_saved_without_it(tmp_path):
    loaded = models.load_model("tiny-llama", device="cpu", dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    kept = torch.rand(loaded.model.get_parameter(name).shape) < 0.5
    put = sparse_lora.put_on(loaded.model, {name: kept}, "sparse_to_sparse", rank=2, alpha=4, seed=0)
    with pytest.raises(ValueError, match="merge them, or save them with sparse_lora.save"):
        models.save_model(loaded.model, loaded.tokenizer, tmp_path / "lost")
    sparse_lora.save(put, tmp_path / "adapters")
    with pytest.raises(ValueError, match="respect a mask: load them with sparse_lora.load"):
        models.load_model(str(tmp_path / "adapters"), device="cpu", dtype="float32")
    other = models.load_model("tiny-llama", device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="respect a mask: load them with sparse_lora.load"):
        models.put_adapters(other.model, str(tmp_path / "adapters"))


def test_a_checkpoint_of_one_mask_or_mode_is_not_gone_on_with_under_another():
    kept = {"a": torch.tensor([[True, False]])}
    found = [
        masked_training.identity(sparse)
        for sparse in (None, (None, "dense"), (kept, "sparse_to_dense"), (kept, "sparse_to_sparse"))
    ]
    found.append(masked_training.identity(({"a": torch.tensor([[False, True]])}, "sparse_to_sparse")))
    assert found[0] == {} and len({str(one) for one in found}) == 5
