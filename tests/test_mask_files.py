"""Does a mask come back bit for bit from every format, and is whatever else a file may hold refused?"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from nbhelpers import mask_files, masks, models, records

FORMATS = list(mask_files.SUFFIXES)
SAID = {"importance": "magnitude", "seed": 3, "created_at": "2020-01-01T00:00:00+00:00"}


@pytest.fixture(scope="module")
def model():
    return small_models.build("gpt2")


@pytest.fixture(scope="module")
def levels(model):
    return masks.create(model, masks.weights(model), [0.1, 0.5, 0.9], absolute=True)


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    return tmp_path / f"mask{request.param}"


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("sparsities", [[0.5], [0.0, 0.1, 0.5, 1.0]])
def test_masks_come_back_bit_for_bit_with_all_that_was_said_of_them(model, path, sparsities):
    made = masks.create(model, masks.weights(model), sparsities, absolute=True, scope="layer")
    told = mask_files.save(path, made, model_fingerprint=models.fingerprint(model), calibration="none", **SAID)
    found = mask_files.load(path, model)
    assert all(same(found.levels.mask(one), made.mask(one)) for one in sparsities)
    assert found.sha256 == told and found.levels.how == {"pattern": "unstructured", "scope": "layer"}
    wanted = SAID | {"sparsities": sparsities, "calibration": "none", "numbers": made.numbers}
    assert {key: found.header[key] for key in wanted} == wanted


def test_a_quantised_model_is_no_other_model_masks_come_before_quantisation(levels, path, monkeypatch):
    mask_files.save(path, levels, importance="magnitude")
    monkeypatch.setattr(mask_files, "is_quantised", lambda module: True)
    with pytest.raises(
        ValueError, match=r"this model is quantised: mask the model first \(nbhelpers masks apply\)"
    ) as found:
        mask_files.load(path, small_models.build("llama"))
    assert "another model" not in str(found.value)


def test_the_moment_is_written_where_none_is_given(levels, path):
    mask_files.save(path, levels, importance="random")
    assert mask_files.load(path).header["created_at"].endswith("+00:00")


def test_the_sha256_is_the_same_in_all_formats_and_that_of_a_pencil(levels, tmp_path):
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(levels.shapes):
        digest.update(json.dumps([name, list(levels.shapes[name]), 4], separators=(",", ":")).encode())
        digest.update(bytes(levels.packed[name].tolist()))
    told = [mask_files.save(tmp_path / f"a{suffix}", levels, **SAID) for suffix in FORMATS]
    assert told == [digest.hexdigest()] * 3


def test_the_sha256_knows_name_shape_and_every_bit(levels):
    first = next(iter(levels.shapes))
    flipped = {name: one.clone() for name, one in levels.packed.items()}
    flipped[first][-1] ^= 1
    side, other = levels.shapes[first]
    others = [
        masks.Levels(levels.sparsities, levels.shapes, flipped),
        masks.Levels(levels.sparsities, levels.shapes | {first: (other, side)}, levels.packed),
        masks.Levels(
            levels.sparsities,
            {f"{name}x" if name == first else name: shape for name, shape in levels.shapes.items()},
            {f"{name}x" if name == first else name: one for name, one in levels.packed.items()},
        ),
    ]
    assert len({mask_files.sha256(one) for one in [levels, *others]}) == 4


def test_a_mask_file_takes_four_bits_a_weight(levels, path):
    mask_files.save(path, levels, **SAID)
    assert levels.numbers / 2 < path.stat().st_size < levels.numbers / 2 + 12_000


def test_the_packed_bits_are_readable_by_safetensors_and_numpy_themselves(levels, tmp_path):
    for suffix in (".safetensors", ".npz"):
        mask_files.save(tmp_path / f"m{suffix}", levels, **SAID)
    tensors, name = load_file(tmp_path / "m.safetensors"), next(iter(levels.shapes))
    assert torch.equal(tensors[name], levels.packed[name])
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:
        assert np.array_equal(file[name], levels.packed[name].numpy())


# Refused --------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(levels, path):
    """Names and padding of archives are in no checksum; what is read then is the same mask, or nothing is."""
    mask_files.save(path, levels, **SAID)
    content, wanted = path.read_bytes(), levels.mask(0.5)
    said = []
    for place in [*range(0, 200, 3), *range(200, len(content), max(1, len(content) // 400))]:
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            found = mask_files.load(path)
        except ValueError as error:
            said.append(str(error))
        else:
            assert same(found.levels.mask(0.5), wanted) and found.header["seed"] == 3
    assert len(said) > 350
    assert all(str(path) in one and "\n" not in one for one in said)


def test_a_flipped_bit_of_the_mask_is_refused_by_its_checksum(levels, tmp_path):
    path = tmp_path / "mask.safetensors"
    mask_files.save(path, levels, **SAID)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mask.safetensors' is refused: its bits do not match its sha256"):
        mask_files.load(path)


def test_a_header_that_was_changed_is_refused(levels, tmp_path):
    path = tmp_path / "mask.safetensors"
    mask_files.save(path, levels, **SAID)
    path.write_bytes(path.read_bytes().replace(b"magnitude", b"gradients"))
    with pytest.raises(ValueError, match="is refused: its header does not match its own sha256"):
        mask_files.load(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 1.0])
def test_a_truncated_file_is_refused(levels, path, share):
    mask_files.save(path, levels, **SAID)
    content = path.read_bytes()
    path.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    with pytest.raises(ValueError, match="is refused: .*; copy it again"):
        mask_files.load(path)


def test_a_longer_file_is_refused(levels, tmp_path):
    path = tmp_path / "mask.safetensors"
    mask_files.save(path, levels, **SAID)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="bytes where its header needs"):
        mask_files.load(path)


def test_a_header_that_says_it_is_huge_is_not_read(tmp_path):
    path = tmp_path / "mask.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header would have 1152921504606846976 bytes in a file of 10"):
        mask_files.load(path)
    with open(path, "wb") as file:
        file.write((mask_files.LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(2 * mask_files.LONGEST_HEADER)
    with pytest.raises(ValueError, match="its header would have"):
        mask_files.load(path)


def test_a_mask_for_another_model_is_refused(levels, model, path):
    mask_files.save(path, levels, model_fingerprint=models.fingerprint(model), **SAID)
    with pytest.raises(ValueError, match="is for another model: the names of the mask"):
        mask_files.load(path, small_models.build("llama"))
    with pytest.raises(ValueError, match=r"is for another model: .* has shape \(32, 96\), its weights \(64, 192\)"):
        mask_files.load(path, small_models.build("gpt2", n_embd=64))
    other = small_models.build("gpt2", seed=1)
    with pytest.raises(ValueError, match="is for a model with other weights .*same_weights=False"):
        mask_files.load(path, other)
    assert mask_files.load(path, other, same_weights=False).sha256 == mask_files.load(path, model).sha256


class Bomb:
    """What a foreign pickle may do when it is opened."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch in the mask", "old torch", "numpy"])
def test_a_foreign_pickle_is_refused_and_nothing_of_it_is_executed(tmp_path, kind):
    marker, path = tmp_path / "executed", tmp_path / f"mask{'.npz' if kind == 'numpy' else '.pt'}"
    bomb = Bomb(marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "torch":
        torch.save(bomb, path)
    elif kind == "torch in the mask":
        torch.save({mask_files.KEY: "{}", "packed": {"w": bomb}}, path)
    elif kind == "old torch":
        torch.save({"w": bomb}, path, _use_new_zipfile_serialization=False)
    else:
        np.savez(path, **{mask_files.KEY: np.array([bomb], object)})
    with pytest.raises(ValueError, match="is refused"):
        mask_files.load(path)
    assert not marker.exists()
    if kind == "torch":
        torch.load(path, weights_only=False)
        assert marker.exists(), "the bomb is none"


def test_a_compressed_archive_is_refused_before_it_is_unpacked(levels, tmp_path):
    path = tmp_path / "mask.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(10**7, np.uint8))
        file.writestr("w.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="holds compressed parts, which masks never are"):
        mask_files.load(path)


def test_files_of_the_right_kind_that_hold_no_masks_are_refused(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.zeros(3)}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", w=np.zeros(3))
    for suffix in FORMATS:
        with pytest.raises(ValueError, match="is refused: it holds .*no masks"):
            mask_files.load(tmp_path / f"a{suffix}")


def rewritten(path, **changes) -> None:
    """The same file with another header, whose own checksum is right."""
    found = mask_files.load(path)
    header = {**found.header, **changes}
    text = records.canonical_json(header | {"header_sha256": records.sha256_json(header)})
    path.write_bytes(mask_files._WRITERS[path.suffix](text, found.levels.packed))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": 2}, "it has format 2, this version reads 1"),
        ({"sparsities": [0.9, 0.5, 0.1]}, "sparsities are not ascending"),
        ({"sparsities": [0.1, 0.5, 7]}, "sparsity must be in"),
        ({"sparsities": [0.5]}, "bytes of bits, and its shape .* needs another number"),
        ({"shapes": {}}, "its header and its bits name other parameters"),
        ({"shapes": {"w": [-1, 2]}}, "its header names the shape"),
        ({"sha256": "0" * 64}, "its bits do not match its sha256"),
    ],
)
def test_a_header_that_does_not_fit_its_bits_is_refused(levels, path, changes, said):
    mask_files.save(path, levels, **SAID)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=said):
        mask_files.load(path)


def test_a_wrong_shape_is_refused_although_it_holds_as_many_weights(levels, model, path):
    mask_files.save(path, levels, **SAID)
    name, shape = next(iter(levels.shapes.items()))
    turned = masks.Levels(levels.sparsities, {**levels.shapes, name: shape[::-1]}, levels.packed)
    mask_files.save(path, turned, **SAID)
    with pytest.raises(ValueError, match=f"is for another model: the mask of {name} has shape"):
        mask_files.load(path, model)


def test_another_format_and_a_missing_file_are_said(levels, tmp_path):
    with pytest.raises(LookupError, match="unknown format of a mask file '.pth'. Did you mean '.pt'"):
        mask_files.save(tmp_path / "mask.pth", levels, **SAID)
    with pytest.raises(FileNotFoundError):
        mask_files.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="already says bits"):
        mask_files.save(tmp_path / "mask.pt", levels, bits=1, **SAID)


# Weights out of files -------------------------------------------------------------------------------------------------


def test_masks_of_a_file_that_is_never_loaded_whole_are_those_of_the_model(tmp_path):
    model = small_models.build("llama").bfloat16()
    weights = masks.weights(model)
    names = list(weights)
    save_file({name: weights[name] for name in names[:9]}, tmp_path / "1.safetensors")
    save_file({name: weights[name] for name in names[9:]}, tmp_path / "2.safetensors", {"format": "pt"})
    streamed = mask_files.Streamed([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], names)
    assert all(torch.equal(streamed[name], weights[name]) for name in names) and len(streamed) == len(names)
    mine, wanted = (masks.create(model, one, [0.3, 0.5], absolute=True) for one in (streamed, weights))
    assert all(torch.equal(mine.packed[name], wanted.packed[name]) for name in names)
    with pytest.raises(LookupError, match="unknown tensor 'lm_head.weight'"):
        mask_files.Streamed([tmp_path / "1.safetensors"], ["lm_head.weight"])


def test_weights_in_a_format_that_is_no_score_are_named(tmp_path):
    save_file({"w": torch.zeros(3, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="w in .* is I8, scores must be F32, BF16, F16"):
        mask_files.Streamed([tmp_path / "a.safetensors"])["w"]
