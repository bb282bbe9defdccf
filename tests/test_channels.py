"""Does a model without its closed channels compute what it computed with them, and is it smaller and loadable?"""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import LAYERS, NAMES, build, ids, text_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nbhelpers import adapters, attention, channels, data, evaluate, importance, models
from nbhelpers.projections import projections

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
WIDTH = {"gpt2": 128}  # four times the hidden size of 32; 48 elsewhere
# written down by hand, apart from the package's own table: what an MLP's channels are made by, and read by
MLP = {"opt": "", "mixtral": "mlp.experts"}
UPS = {"gpt2": ["c_fc"], "opt": ["fc1"], "gpt_neox": ["dense_h_to_4h"], "mixtral": ["gate_up_proj"]}
UPS |= {"phi3": ["gate_up_proj"]}
DOWN = {"gpt2": "c_proj", "opt": "fc2", "gpt_neox": "dense_4h_to_h"}
FIELD = {"gpt2": "n_inner", "opt": "ffn_dim"}
GATED = ["gate_proj", "up_proj"]


def width(name: str) -> int:
    return WIDTH.get(name, 48)


def odd(name: str) -> int:
    """A number of channels that is no round one, as far as experts allow."""
    return 16 if name == "mixtral" else 17


def shape(name: str) -> tuple[int, int]:
    return (3 if name == "llama" else 2), (4 if name == "mixtral" else 1)


def chosen(name: str, number: int, seed: int = 0):
    """So many channels of every layer and expert, others in each."""
    draw = torch.Generator().manual_seed(seed)
    layers, experts = shape(name)
    return tuple(
        tuple(tuple(sorted(torch.randperm(width(name), generator=draw)[:number].tolist())) for _ in range(experts))
        for _ in range(layers)
    )


def holder(model, name: str, layer: int):
    return model.get_submodule(f"{LAYERS.get(name, 'model.layers')}.{layer}.{MLP.get(name, 'mlp')}".rstrip("."))


def made(name: str, dtype=torch.float32, **options):
    model = build(name, **options).to(dtype)
    if name == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


@torch.no_grad()
def closed_by_hand(name: str, kept, dtype=torch.float32, **options):
    """Columns of the down projection of what is not kept, zeroed one by one."""
    model = made(name, dtype, **options)
    for layer, experts in enumerate(kept):
        for expert, stay in enumerate(experts):
            down = getattr(holder(model, name, layer), DOWN.get(name, "down_proj"))
            for channel in set(range(width(name))) - set(stay):
                if name == "mixtral":
                    down[expert, :, channel] = 0
                elif name == "gpt2":
                    down.weight[channel, :] = 0
                else:
                    down.weight[:, channel] = 0
    return model


@torch.no_grad()
def logits(model, rows=None, mask=None) -> torch.Tensor:
    return model(input_ids=ids() if rows is None else rows, attention_mask=mask).logits


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def written(model, **options) -> torch.Tensor:
    return model.generate(ids()[:, :8], max_new_tokens=7, do_sample=False, pad_token_id=0, **options)


@pytest.fixture(scope="session")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"ab": 0, "cd": 1}, unk_token="ab")))


# --------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_without_channels_the_logits_and_the_text_are_those_with_them_closed_by_hand(name, dtype):
    rows = ids(3, 16)
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    for number in (8 if name == "mixtral" else 1, odd(name), width(name)):
        kept = chosen(name, number)
        narrow, expected = channels.remove_channels(made(name, dtype), kept), closed_by_hand(name, kept, dtype)
        assert relative(logits(narrow), logits(expected)) <= LIMIT[dtype]
        real = mask.bool()
        assert relative(logits(narrow, rows, mask)[real], logits(expected, rows, mask)[real]) <= LIMIT[dtype]
        for cache in (True, False) if number == odd(name) and dtype == torch.float32 else ():
            assert torch.equal(written(narrow, use_cache=cache), written(expected, use_cache=False))


@pytest.mark.parametrize("name", NAMES)
def test_closing_changes_what_the_model_computes_and_is_what_the_hand_does(name):
    kept, model = chosen(name, odd(name)), made(name)
    before = logits(model)
    channels.prune_channels(model, channels.others(kept, width(name)))
    assert torch.equal(logits(model), logits(closed_by_hand(name, kept)))
    assert relative(logits(model), before) > 1e-2
    assert channels.closed_channels(model) == channels.others(kept, width(name))
    narrow = channels.remove_channels(model, kept)
    assert relative(logits(narrow), logits(model)) <= 1e-5
    assert all(one == () for layer in channels.closed_channels(narrow) for one in layer)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_a_closed_channel_adds_nothing_even_where_its_bias_alone_made_it_add_something(name):
    """A channel that reads nothing adds act(b) times its column to every token. Closed or removed it adds 0, and the
    down projection's own bias stays: the MLP of a layer without other channels then gives that bias alone."""
    model = made(name)
    mlp = holder(model, name, 0)
    up, down = getattr(mlp, UPS[name][0]), getattr(mlp, DOWN[name])
    with torch.no_grad():
        (up.weight if name != "gpt2" else up.weight.T)[5] = 0
        up.bias[5] = 3.0
    x = torch.randn(4, 32)

    def through(model) -> torch.Tensor:
        if name != "opt":
            return holder(model, name, 0)(x)
        layer = holder(model, name, 0)
        return layer.fc2(layer.activation_fn(layer.fc1(x)))

    bias, act = down.bias.detach().clone(), {"opt": 3.0}.get(name, torch.nn.functional.gelu(torch.tensor(3.0)).item())
    column = (down.weight if name != "gpt2" else down.weight.T)[:, 5].detach().clone()
    alone = chosen(name, 1)
    alone = (((5,),), *alone[1:])
    constant = through(channels.remove_channels(model, alone))
    torch.testing.assert_close(constant, (bias + act * column).expand(4, 32), rtol=1e-3, atol=1e-4)
    everything = tuple((tuple(range(width(name))),) for _ in range(2))
    channels.prune_channels(model, everything)
    torch.testing.assert_close(through(model), bias.expand(4, 32))


def test_the_given_model_stays_as_it_was_and_only_mlp_tensors_are_new():
    for name in ("gpt2", "llama", "mixtral"):
        model = made(name)
        before, where = models.fingerprint(model), {name: p.data_ptr() for name, p in model.named_parameters()}
        narrow = channels.remove_channels(model, chosen(name, 8))
        assert models.fingerprint(model) == before and getattr(model.config, FIELD.get(name, "intermediate_size")) != 8
        new = {name for name, p in narrow.named_parameters() if p.data_ptr() != where[name]}
        assert new and all(("mlp" in one and "gate.weight" not in one) for one in new)
        down_bias = [one for one in new if one.endswith("c_proj.bias")]
        assert not down_bias and channels.removal(model) is None


def test_rows_and_columns_are_those_of_the_channels_kept_and_gates_stay_with_their_ups():
    model = made("phi3")
    kept = ((tuple(range(0, 48, 5)),), (tuple(range(1, 48, 5)),))
    narrow = channels.remove_channels(model, kept)
    for layer, (stay,) in enumerate(kept):
        old, new = model.model.layers[layer].mlp, narrow.model.layers[layer].mlp
        rows = [*stay, *(48 + at for at in stay)]
        assert torch.equal(new.gate_up_proj.weight, old.gate_up_proj.weight[rows])
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, list(stay)])
        assert (new.gate_up_proj.out_features, new.down_proj.in_features) == (20, 10)
    for name, own in (("llama", "intermediate_size"), ("mixtral", "intermediate_dim")):
        assert getattr(holder(channels.remove_channels(made(name), chosen(name, 8)), name, 1), own) == 8
    assert channels.removal(narrow).as_dict() == {
        "channels": 48,
        "kept": [[list(one) for one in layer] for layer in kept],
    }


def test_closed_heads_stay_closed_in_the_narrow_copy():
    model, kept = made("llama"), chosen("llama", 17)
    attention.install(model)
    attention.close_heads(model, [(0, 1), (2, 3)])
    narrow = channels.remove_channels(model, kept)
    assert attention.closed_heads(narrow) == [(0, 1), (2, 3)]
    channels.prune_channels(model, channels.others(kept, 48))
    assert relative(logits(narrow), logits(model)) <= 1e-5


def test_a_narrow_model_is_trained_as_any_other():
    narrow = channels.remove_channels(made("gpt2"), chosen("gpt2", 8))
    narrow(ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in narrow.parameters())


# ------------------------------------------------------------------------------------------------------------- smaller

# numbers of one channel beside a hidden size of 32: its row of each up or gate, its bias, its column of the down
PENCIL = dict.fromkeys(["gpt2", "opt", "gpt_neox"], 32 + 1 + 32)
PENCIL["mixtral"] = 4 * 3 * 32  # of each expert


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_smaller_by_the_pencils_count_and_loads_by_plain_transformers_and_by_us(
    name, tokenizer, tmp_path
):
    left = 16 if name == "mixtral" else 12
    model, kept = made(name), chosen(name, left)
    narrow = channels.remove_channels(model, kept)
    gone = shape(name)[0] * (width(name) - left) * PENCIL.get(name, 3 * 32)
    assert models.parameters(model) - models.parameters(narrow) == gone
    folder = models.save_model(narrow, tokenizer, tmp_path / "model")
    assert models.stored_bytes(folder) == models.weight_bytes(model) - 4 * gone
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(plain.config, FIELD.get(name, "intermediate_size")) == left
    ours = models.load_model(str(folder), device="cpu", dtype="float32").model
    for loaded in (plain, ours):
        assert models.parameters(loaded) == models.parameters(narrow)
        assert relative(logits(loaded), logits(closed_by_hand(name, kept))) <= 1e-5
    assert channels.channel_geometry(ours).channels == left, "it can be pruned further"


# ------------------------------------------------------------------------------------------------------------- refused


def test_what_no_config_can_say_is_refused():
    model = made("llama")
    unequal = (((0, 1),), ((0,),), ((0, 1),))
    with pytest.raises(ValueError, match="must keep equally many channels, got from 1 to 2: no config can say that"):
        channels.remove_channels(model, unequal)
    with pytest.raises(ValueError, match="at least one channel must stay in every layer"):
        channels.remove_channels(model, (((),),) * 3)
    with pytest.raises(ValueError, match="channel 48 does not exist: 48 channels, from 0"):
        channels.remove_channels(model, (((48,),),) * 3)
    with pytest.raises(ValueError, match=r"listed for 3 layers of 1 experts each .*, got \[1, 1\]"):
        channels.prune_channels(model, (((1,),),) * 2)
    experts = made("mixtral")
    with pytest.raises(ValueError, match=r"listed for 2 layers of 4 experts each"):
        channels.remove_channels(experts, (((1,),),) * 2)
    one_expert_more = (((0, 1), (0,), (0,), (0,)),) * 2
    with pytest.raises(ValueError, match="every layer and expert must keep equally many"):
        channels.remove_channels(experts, one_expert_more)
    with pytest.raises(ValueError, match="experts must keep a multiple of 8 channels, got 12: their grouped product"):
        channels.remove_channels(experts, chosen("mixtral", 12))
    channels.prune_channels(model, unequal)  # closing can
    assert channels.closed_channels(model) == unequal


def test_foreign_architectures_adapters_and_quantised_weights_are_refused():
    model = made("llama")
    model.config.model_type = "mamba"
    with pytest.raises(LookupError, match="unknown architecture for channel removal 'mamba'"):
        channels.channel_geometry(model)
    with adapters.quiet_peft():
        adapted = get_peft_model(made("llama"), LoraConfig(target_modules=["up_proj"])).get_base_model()
    with pytest.raises(ValueError, match="carries adapters that are not merged: merge them before channels"):
        channels.remove_channels(adapted, chosen("llama", 8))
    packed = made("llama")
    packed.model.layers[0].mlp.down_proj.weight.quant_state = object()
    with pytest.raises(ValueError, match="channels cannot be removed from quantised weights"):
        channels.remove_channels(packed, chosen("llama", 8))


# ----------------------------------------------------------------------------------------------------------- which ones


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "mixtral", "phi3"])
def test_a_channels_score_is_the_sum_over_all_that_it_couples(name):
    model = made(name)
    squares = [(one.name, model.get_parameter(one.name).detach() ** 2) for one in projections(model).covered]
    found = channels.channel_scores(model, squares)
    assert found.shape == (*shape(name), width(name)) and found.dtype == torch.float64
    for layer, expert, channel in [(0, 0, 0), (1, shape(name)[1] - 1, width(name) - 1), (1, 0, 7)]:
        inside, total = holder(model, name, layer), 0.0
        for part in [*UPS.get(name, GATED), DOWN.get(name, "down_proj")]:
            weight = getattr(inside, part)
            weight = weight[expert] if name == "mixtral" else weight.weight.T if name == "gpt2" else weight.weight
            lines = weight.T if part == DOWN.get(name, "down_proj") else weight
            at = [channel, width(name) + channel] if part == "gate_up_proj" else [channel]
            total += sum(x * x for line in at for x in lines[line].tolist())
        assert found[layer, expert, channel].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_coupled_covers_every_mlp_weight_and_nothing_else(name):
    model = made(name)
    found = {one for layer in channels.coupled(model) for one in layer}
    mlp = ("fc1", "fc2") if name == "opt" else ("mlp",)
    assert found == {one.name for one in projections(model).covered if any(part in one.name for part in mlp)}


def test_scores_that_lack_a_coupled_weight_are_refused():
    model = made("llama")
    some = [one for one in importance.scores(model, "magnitude") if "layers.1.mlp.up_proj" not in one[0]]
    with pytest.raises(ValueError, match=r"scores lack model\.layers\.1\.mlp\.up_proj\.weight: a channel needs"):
        channels.channel_scores(model, some)


@pytest.mark.parametrize("strategy", importance.IMPORTANCE.names())
def test_channels_that_do_nothing_are_the_first_to_go_under_every_importance_but_random(strategy):
    model, dead = made("llama"), chosen("llama", 12, seed=4)
    with torch.no_grad():
        for layer, (gone,) in zip(model.model.layers, dead, strict=True):
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[list(gone)] = 0
            layer.mlp.down_proj.weight[:, list(gone)] = 0
    scores = channels.channel_scores(model, importance.scores(model, strategy, text_rows()))
    kept = channels.choose_channels(scores, 0.25)
    assert (channels.others(kept, 48) == dead) == (strategy != "random")


SCORES = torch.tensor([[[0.3, 0.1, 0.2, 0.1]], [[1.0, 2.0, 3.0, 4.0]]])


@pytest.mark.parametrize(
    "level, kept",
    [
        (0, (((0, 1, 2, 3),), ((0, 1, 2, 3),))),
        (0.25, (((0, 2, 3),), ((1, 2, 3),))),  # of equal ones the first goes
        (0.5, (((0, 2),), ((2, 3),))),
        (0.625, (((0, 2),), ((2, 3),))),  # 2.5 channels, the even neighbour is 2
        (0.75, (((0,),), ((3,),))),
    ],
)
def test_the_least_important_of_each_layer_go_in_exact_number(level, kept):
    assert channels.choose_channels(SCORES, level) == kept


def test_levels_are_nested_and_never_take_all():
    scores = torch.rand(2, 1, 48)
    found = [channels.others(channels.choose_channels(scores, level), 48) for level in (0.1, 0.5, 0.9)]
    for less, more in itertools.pairwise(found):
        assert all(set(a) < set(b) for x, y in zip(less, more, strict=True) for a, b in zip(x, y, strict=True))
    for level in (1, 0.99):
        with pytest.raises(ValueError, match=f"level {level} would close all 48 channels of every layer"):
            channels.choose_channels(scores, level)
    for level in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"level must be in \[0, 1\], got"):
            channels.choose_channels(scores, level)


def test_more_stay_where_their_number_must_be_a_multiple():
    def left(scores, level, **options):
        return {len(one) for layer in channels.choose_channels(scores, level, **options) for one in layer}

    plain, experts = torch.rand(2, 1, 48), torch.rand(2, 4, 48)
    assert left(plain, 0.5) == {24} and left(plain, 0.3) == {34}  # 14.4 go
    assert left(plain, 0.3, multiple_of=16) == {48} and left(plain, 0.7, multiple_of=16) == {16}  # 33.6 go, 14 stay
    assert left(experts, 0.3) == {40} and left(experts, 0.3, multiple_of=1) == {34} and left(experts, 0.5) == {24}
    assert left(torch.rand(1, 1, 50), 0.1, multiple_of=64) == {50}, "never more than there are"


# --------------------------------------------------------------------------------------------------------------- speed


def test_speed_is_measured_of_the_whole_the_closed_and_the_narrow_model_in_turn(monkeypatch):
    model, kept = made("gpt2"), chosen("gpt2", 16)
    before, given = models.fingerprint(model), []

    def measure(three, rows, *, passes, should_stop):
        given.append(([models.parameters(one) for one in three], passes, [logits(one) for one in three]))
        return [100.0, 110.0, 150.0]

    monkeypatch.setattr(evaluate, "tokens_per_second", measure)
    speed = channels.measured_speed(model, kept, text_rows(), passes=3)
    ((sizes, passes, (whole, closed, narrow)),) = given
    assert sizes[0] == sizes[1] > sizes[2] and passes == 3
    assert torch.equal(whole, logits(made("gpt2"))) and torch.equal(closed, logits(closed_by_hand("gpt2", kept)))
    assert relative(narrow, closed) <= 1e-5 and models.fingerprint(model) == before
    assert (speed.masks_alone, speed.removal) == (pytest.approx(1.1), 1.5)
    assert speed.line().startswith("removal: 1.50 times as fast; masks alone: none (measured 1.10")


@pytest.mark.slow
def test_half_of_the_channels_less_takes_less_processor_time_than_half_of_them_zero(monkeypatch):
    monkeypatch.setattr(evaluate, "_now", lambda model: time.process_time())  # whatever else runs on the machine
    model = build("llama", hidden_size=256, intermediate_size=1024)
    kept = channels.choose_channels(torch.rand(3, 1, 1024, generator=torch.Generator().manual_seed(0)), 0.5)
    speed = channels.measured_speed(model, kept, text_rows((64,) * 8), passes=11)
    assert speed.removal > 1.2 * speed.masks_alone  # a quiet machine: 1.55 and 1.01


def test_a_real_model_without_half_its_channels_writes_what_it_writes_with_them_closed(data_dir, tmp_path):
    loaded = models.load_model(str(data_dir / "models" / "stories260K-hf"), device="cpu", dtype="float32")
    rows = data.rows(loaded.tokenizer, data.read_documents(data_dir / "tinystories.jsonl"), 256, 8 * 256)
    scores = channels.channel_scores(loaded.model, importance.scores(loaded.model, "taylor_squared", rows[:4]))
    kept = channels.choose_channels(scores, 0.5)
    at_random = channels.choose_channels(torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)), 0.5)
    by_chance = evaluate.perplexity(channels.remove_channels(loaded.model, at_random), rows[4:]).perplexity
    folder = models.save_model(channels.remove_channels(loaded.model, kept), loaded.tokenizer, tmp_path / "model")
    narrow = models.load_model(str(folder), device="cpu", dtype="float32")
    channels.prune_channels(loaded.model, channels.others(kept, scores.shape[-1]))
    closed = evaluate.perplexity(loaded.model, rows[4:]).perplexity
    assert evaluate.perplexity(narrow.model, rows[4:]).perplexity == pytest.approx(closed, rel=1e-5) and (
        closed < by_chance
    )
    texts = {evaluate.generate(one.model, one.tokenizer, "Once upon a time", temperature=0) for one in (loaded, narrow)}
    assert len(texts) == 1
