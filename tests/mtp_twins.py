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
