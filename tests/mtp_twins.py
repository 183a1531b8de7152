"""Twins with further-token layers, which transformers neither has nor saves."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from arch_maps.facts import Facts
from arch_maps.registry import find
from validate.twin import load_example, make_twin

LAYERS = {
    "qwen3_5": ("text_config", "mtp_num_hidden_layers"),
    "glm4_moe_lite": ("", "num_nextn_predict_layers"),
    "qwen4_exp": ("text_config", "mtp_num_hidden_layers"),
}


def make_mtp_twin(model_type: str, folder: Path, *, dtype: str = "float32") -> Path:
    """The type's twin with one more layer, of every tensor that the map drops as a drafter."""
    make_twin(load_example(model_type), folder, dtype=dtype)
    config = json.loads((folder / "config.json").read_text())
    section, key = LAYERS[model_type]
    (config[section] if section else config)[key] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    arch = find(model_type)
    for drop in arch.expand(Facts(config), arch.layouts[0]).drops:
        if "drafter" in drop.reason and drop.shape and "embed_tokens" not in drop.name:
            numbers = np.random.default_rng(zlib.crc32(drop.name.encode()))
            wide = drop.shape[-1] ** -0.5 if len(drop.shape) > 1 else 0.3
            tensors[drop.name] = numbers.normal(0, wide, drop.shape).astype(np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


EMBED = "model.language_model.embed_tokens.weight"
QUIET = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
"""Ends of the names of what a layer adds to the residual stream through."""


def make_agreeing_twin(folder: Path, *, stray: float, settled: bool = False) -> Path:
    """A Qwen3.5 twin whose next token follows mostly from the last one, and a drafter that knows.

    The layers of both add little, the drafter passes the last token's embedding on, and both end in
    the same norm and head. ``stray`` is how loud the layers are: what they add is where the drafter
    errs, so that some of its drafts are refused. ``settled``: every token has nearly the same
    embedding, so that the text soon repeats one token, which a drafter of whole blocks can guess.
    """
    make_mtp_twin("qwen3_5", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(QUIET) and "visual" not in name:
            tensors[name] *= np.float32(stray)
    width = len(tensors["mtp.norm.weight"])
    if settled:
        common = np.random.default_rng(1).normal(0, 1, width).astype(np.float32)
        tensors[EMBED] = common + np.float32(0.3) * tensors[EMBED]
    zeros = np.zeros((width, width), np.float32)
    tensors["mtp.fc.weight"] = np.concatenate([np.eye(width, dtype=np.float32), zeros], axis=1)
    tensors["mtp.pre_fc_norm_embedding.weight"] = np.zeros(width, np.float32)
    tensors["mtp.norm.weight"] = tensors["model.language_model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def make_agreeing_dflash(folder: Path, target: Path, *, stray: float) -> Path:
    """A DFlash twin that guesses what follows its mask token in the settled ``target``."""
    make_twin(load_example("qwen3_dflash"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(QUIET):
            tensors[name] *= np.float32(stray)
    own = load_file(target / "model.safetensors")["model.language_model.norm.weight"]
    tensors["norm.weight"] = own + np.float32(1)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
