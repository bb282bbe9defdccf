"""How does a model get in and out? Bundled name, local folder or hub id in; a folder for plain transformers out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from nbhelpers import adapters, attention, catalogue, compact, records, runtime
from nbhelpers.architecture import geometry, is_supported
from nbhelpers.quantization import Quantization, mend_4bit_on_cpu, quantization_config
from nbhelpers.registry import unknown

BUNDLED = Path(__file__).parent / "assets" / "models"
GATES_FILE = "head_gates.json"
GATES_FORMAT = 1
DTYPES = {
    "auto": None,
    "stored": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its own tokenizer. `source`: bundled, folder or hub."""

    model: nn.Module
    tokenizer: object
    name: str
    source: str


def bundled_names() -> list[str]:
    """Names of the tiny models that come with the package."""
    return sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").is_file())


def locate(name: str) -> tuple[str, str]:
    """(source, location) of a model name without loading it: bundled, folder or hub.

    LookupError for a name that can be none of the three; ValueError for a folder that holds no model.
    """
    name = str(name)
    if not name:
        raise LookupError("model must be named, got ''; give a bundled name, a local folder or a hub id")
    if name in bundled_names():
        return "bundled", str(BUNDLED / name)
    folder = Path(os.path.expanduser(name))  # an unknown ~user stays as it is
    if folder.exists():
        return "folder", str(_model_folder(folder))
    if "/" not in name and name.lower() in map(str.lower, catalogue.names()):
        return "hub", catalogue.hub_id(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LookupError(f"model folder {name!r} does not exist; give a bundled name, an existing folder or a hub id")
    if name.count("/") == 1 and all(name.split("/")):
        return "hub", name
    known = [*bundled_names(), *catalogue.names()]
    raise LookupError(unknown("model", name, known) + " (or a local folder, or a hub id like owner/name)")


def _model_folder(folder: Path) -> Path:
    if folder.is_file():
        raise ValueError(
            f"model must be a folder, got the file {str(folder)!r}; name the folder that holds config.json"
        )
    for place in (folder, folder / "model"):  # a run directory: its model
        if (place / "config.json").is_file() or (place / adapters.CONFIG).is_file():
            return place
    raise ValueError(f"{str(folder)!r} is no model: it has no config.json; name a folder written by save_pretrained")


def load_config(name: str):
    """The transformers config of a model name; no weights are read."""
    from transformers import AutoConfig

    source, location = locate(name)
    below = adapters.base_of(location) if source == "folder" else None
    if below is not None:
        return load_config(_below(name, below))
    with _clear_errors(name, source, "config.json"):
        return AutoConfig.from_pretrained(location, local_files_only=source != "hub", trust_remote_code=False)


def load_model(
    name: str, *, device: str | None = None, dtype: str = "auto", quantization: Quantization | None = None
) -> LoadedModel:
    """Load a model and its tokenizer, attending through head gates where its architecture allows; saved gates closed.

    `name`: bundled name, local folder (also a run directory) or hub id. `dtype`: auto (by device), stored (as in the
    file), float32, bfloat16 or float16. `quantization`: 8bit or 4bit (nf4, double quantisation) by bitsandbytes. Only
    safetensors are read and no code from the model's folder is run. A compact model comes back as narrow as it was
    saved. A folder of adapters (QLoRA) is the model they belong on, quantised as it was, with them.
    LookupError for an unknown name, ValueError for files that are no model.
    """
    if dtype not in DTYPES:
        raise LookupError(unknown("dtype", dtype, DTYPES))
    if quantization is not None and quantization not in get_args(Quantization):
        raise LookupError(unknown("quantization", quantization, get_args(Quantization)))
    source, location = locate(name)
    device = device or runtime.device()
    chosen = DTYPES[dtype] or runtime.dtype_for(device)
    _check_device(device)
    below = adapters.base_of(location) if source == "folder" else None
    if below is not None:
        return _load_adapted(name, location, below, device, dtype, quantization)
    options = {"dtype": chosen, "use_safetensors": True, "local_files_only": source != "hub"}
    options |= {"ignore_mismatched_sizes": True}  # they are listed and refused below
    if quantization:
        options |= {"quantization_config": quantization_config(quantization, chosen), "device_map": {"": device}}
    config = load_config(name)  # first, so that what is wrong with it is said of it
    removal = compact.load_record(location, config)
    tokenizer = load_tokenizer(name)
    with _clear_errors(name, source, "weights"):
        model, loading = compact.loader(config, removal).from_pretrained(
            location, output_loading_info=True, trust_remote_code=False, **options
        )
    missing = sorted(
        {*loading["missing_keys"], *(key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])}
    )
    if missing:
        raise ValueError(
            f"{name!r} lacks weights that its config asks for, or has them in another shape: "
            f"{', '.join(missing[:3])} ({len(missing)} in all); copy the model again"
        )
    if quantization:
        mend_4bit_on_cpu(model)
    else:
        model.to(device)
    model.eval()
    where = str(Path(location).resolve()) if source == "folder" else name
    model.nbhelpers_loaded = {"model": where, "quantization": quantization, "dtype": dtype}
    if removal is not None:
        model.nbhelpers_removal = removal
    if is_supported(model):
        attention.install(model)
        load_gates(model, location)
    return LoadedModel(model, tokenizer, str(name), source)


def _load_adapted(name: str, location: str, below: dict, device: str, dtype: str, quantization) -> LoadedModel:
    """The model that a folder's adapters belong on, with them."""
    if quantization not in (None, below["quantization"]):
        raise ValueError(
            f"the adapters of {name!r} belong on a model with quantization {below['quantization']!r}, got "
            f"{quantization!r}; leave it out"
        )
    known = below.get("dtype") or "auto" if dtype == "stored" else dtype
    model = load_model(_below(name, below), device=device, dtype=known, quantization=below["quantization"]).model
    put_adapters(model, name)
    return LoadedModel(model, load_tokenizer(name), str(name), "folder")


def check_adapters(folder: str) -> dict:
    """What a folder of adapters belongs on; ValueError for one that holds none. No weights are read."""
    source, location = locate(folder)
    below = adapters.base_of(location) if source == "folder" else None
    if below is None:
        raise ValueError(f"adapter must be a local folder with {adapters.CONFIG}, got {folder!r}")
    return below


def put_adapters(model: nn.Module, folder: str) -> None:
    """Put the adapters of a folder on a model from load_model, in place, its closed heads too.

    ValueError where the model carries others already, is quantised otherwise than the one they were trained on, holds
    other weights than it did then, or has other shapes.
    """
    below, location, loaded = check_adapters(folder), locate(folder)[1], getattr(model, "nbhelpers_loaded", {})
    if adapters.are_on(model):
        raise ValueError("the model carries adapters already; name the model that they were made on")
    if "files" in below and loaded.get("quantization") != below["quantization"]:
        raise ValueError(
            f"the adapters of {folder!r} belong on a model with quantization {below['quantization']!r}, this one was "
            f"loaded with {loaded.get('quantization')!r}"
        )
    files = _files_sha256(loaded["model"]) if below.get("files") and "model" in loaded else None
    if files is not None and files != below["files"]:
        raise ValueError(
            f"the adapters of {folder!r} were trained on other weights than {loaded['model']!r} holds (they were on "
            f"{below['model']!r}); load the model as it was then"
        )
    with _clear_errors(folder, "folder", "adapters"):
        adapters.put_on(model, location)
    model.eval()
    if is_supported(model):
        load_gates(model, location)


def _files_sha256(name: str) -> str | None:
    found = files_fingerprint(name)
    return None if found is None else records.sha256_json(found)


def _below(name: str, below: dict) -> str:
    """The name of the model that adapters belong on; LookupError says whose adapters where it is not there."""
    try:
        locate(below["model"])
    except (LookupError, ValueError) as error:
        raise LookupError(f"the adapters of {str(name)!r} belong on a model that is not here: {error}") from error
    return below["model"]


def _check_device(device: str) -> None:
    """ValueError for a device that torch does not know or that this machine does not have."""
    runtime.dtype_for(device)  # refuses unknown names
    kind = str(device).split(":")[0]
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {str(device)!r} is not here; use {runtime.device()!r}, or leave it out")


def load_tokenizer(name: str):
    """The tokenizer of a model name. One without a pad token stays as it is: padding here goes by attention mask."""
    from transformers import AutoTokenizer

    source, location = locate(name)
    with _clear_errors(name, source, "tokenizer files (tokenizer.json and others)"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                location, local_files_only=source != "hub", trust_remote_code=False
            )
        except Exception as error:
            if type(error) is Exception:  # what the tokenizers library raises for a file it cannot read
                raise ValueError(str(error)) from error
            raise
    if _ends_texts(tokenizer):
        tokenizer.add_eos_token = False
        if _ends_texts(tokenizer):
            raise ValueError(
                f"the tokenizer of {name!r} ends every text with its end token, so nothing could follow one; save "
                "it with add_eos_token=False"
            )
    tokenizer.model_max_length = int(1e30)  # windows are cut by data.py; no warning about long texts
    return tokenizer


def _ends_texts(tokenizer) -> bool:
    """Whether it puts an end token after every text by itself."""
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


@contextmanager
def _clear_errors(name: str, source: str, what: str) -> Iterator[None]:
    """Turns what transformers and safetensors raise for unusable files into one line that names the model."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name!r} holds a corrupt safetensors file ({error}); copy the model again") from error
    except ImportError as error:
        raise ValueError(f"{name!r} needs a package that is missing: {_first_line(error)}") from error
    except OSError as error:
        way_out = "only safetensors are read: save it again with save_pretrained"
        if source == "hub":
            way_out = (
                "there is no such folder here, so it was asked for on the hub: check the id and the connection, "
                f"or use a bundled model: {', '.join(bundled_names())}"
            )
        raise ValueError(f"cannot load {name!r}: {_first_line(error)}; {way_out}") from error
    except StrictDataclassError as error:
        raise ValueError(f"cannot load {name!r}: {' '.join(str(error).split())}; check its {what}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot load {name!r}: {_first_line(error)}; check its {what}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def save_model(model: nn.Module, tokenizer, folder: str | Path) -> Path:
    """Write a model that plain transformers loads and computes the same with; closed heads also lie in head_gates.json.

    A compact model has a record beside, compact_heads.json, which says what loads it: plain transformers too, or
    load_model alone (plain transformers then refuses the shapes of its weights). A model with adapters is saved as its
    adapters, in PEFT's format, with the name of the model that they belong on.

    The files are written to a folder beside and renamed, so a folder under its final name is complete; after an error
    (OSError where the disk is full) nothing is left. FileExistsError for a folder that is not empty.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"model folder {str(folder)!r} is not empty; choose another one")
    closed = attention.closed_heads(model) if is_supported(model) else []
    adapted = adapters.are_on(model)
    state = attention.state_dict_without_closed_heads(model) if closed and not adapted else None
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)  # what a killed run left
    try:
        beside.mkdir(parents=True)
        if adapted:
            below = getattr(model, "nbhelpers_loaded", None)
            adapters.save(model, beside, below and _files_sha256(below["model"]))
        else:
            model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        if closed:
            save_gates(model, beside)
        compact.save_record(model, beside)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise OSError(
            f"cannot write model folder {str(folder)!r}: {reason}; free some space or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def save_gates(model: nn.Module, folder: str | Path) -> None:
    """Write the closed heads beside the weights."""
    geo = geometry(model.config)
    closed = [list(head) for head in attention.closed_heads(model)]
    content = {"format": GATES_FORMAT, "layers": geo.layers, "heads": geo.heads, "closed_heads": closed}
    records.write_json(Path(folder) / GATES_FILE, content)


def load_gates(model: nn.Module, folder: str | Path) -> None:
    """Close the heads that lie beside the weights, if any. ValueError where they were saved for another geometry."""
    path = Path(folder) / GATES_FILE
    if not path.is_file():
        return
    content, geo = records.read_json(path), geometry(model.config)
    found = content.get("format") if isinstance(content, dict) else None
    if found != GATES_FORMAT:
        raise ValueError(f"{str(path)!r} has format {found!r}, expected {GATES_FORMAT}; copy the model again")
    layers, heads, closed = (content.get(field) for field in ("layers", "heads", "closed_heads"))
    if (layers, heads) != (geo.layers, geo.heads):
        raise ValueError(
            f"{str(path)!r} is for {layers} layers of {heads} heads, the model has {geo.layers} of {geo.heads}"
        )
    if not isinstance(closed, list):
        raise ValueError(f"{str(path)!r} needs a list 'closed_heads', got {closed!r}; copy the model again")
    attention.close_heads(model, closed)


def check_prunable(name: str) -> None:
    """ValueError, before any weights are read, for a compact model whose config cannot say what is left of it.

    It predicts and writes, but its layers differ from their config, so no further heads can be chosen in it.
    """
    removal = compact.load_record(locate(name)[1], load_config(name))
    if removal is not None and removal.loads_with == compact.OURS:
        raise ValueError(
            f"{name!r} is a compact model with other heads than its config says, it cannot be pruned further; prune "
            "the model it was made from to a higher level"
        )


def fingerprint(model: nn.Module) -> str:
    """sha256 over all weights (name, dtype, shape, bytes, sorted by name) and the closed heads: all that decides."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    closed = attention.closed_heads(model) if is_supported(model) else []
    digest.update(repr(closed).encode())
    return digest.hexdigest()


def files_fingerprint(name: str) -> dict[str, str] | None:
    """sha256 of every file that decides what a model here is (its adapters' base included), no weights loaded; None for
    a hub id, whose revision is known once it is loaded."""
    source, location = locate(name)
    if source == "hub":
        return None
    below = adapters.base_of(location)
    found = {} if below is None else files_fingerprint(below["model"])
    if found is None:
        return None
    files = sorted(path for path in Path(location).iterdir() if path.is_file())
    return {f"below/{key}": value for key, value in found.items()} | {f.name: records.sha256_known(f) for f in files}


def hub_commit(name: str) -> str | None:
    """The commit of a hub id whose config lies in the hub's cache here: that of what is loaded next; else None."""
    from huggingface_hub import try_to_load_from_cache

    source, location = locate(name)
    found = try_to_load_from_cache(location, "config.json") if source == "hub" else None
    return Path(found).parent.name if isinstance(found, str) else None


def revision(name: str) -> dict[str, str] | str | None:
    """What tells a model's weights from others without reading them: sha256 of its files, or of a hub id its commit;
    None for one of the hub that is not in the cache yet."""
    return files_fingerprint(name) or hub_commit(name)


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 over the whole fast tokenizer (vocabulary, merges, special tokens, post-processing).

    Truncation and padding are left out: they are what the last call asked for, not what the tokenizer is.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return records.sha256_json(content)


def parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones counted once; 4-bit weights, two of which share a byte, one by one."""
    return sum(_numbers(parameter) for parameter in model.parameters())


def _numbers(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that save_model writes, tied ones once: what stored_bytes reads of the files."""
    stored = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def stored_bytes(folder: str | Path) -> int:
    """Bytes of the tensors in a folder's safetensors files, as they lie on disk, without the files' headers."""
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        total += path.stat().st_size - 8 - header
    return total


def max_positions(model_or_config) -> int | None:
    """Longest text in tokens that the model's positions allow; None where the config names no limit."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config, "max_position_embeddings", None)
