"""Shared by the tests of streams: releases in shards on a staging hub, conversions of them."""

import json
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
from huggingface_hub import HfApi
from release_helpers import LLAMA, hashes, make
from safetensors.numpy import save_file

from arch_maps.facts import Facts
from arch_maps.ops import sources
from converter.plan.match import find_map
from converter.staging import Faults

CONFIG = LLAMA | {"vocab_size": 256}
MIXTRAL = CONFIG | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
REPO = "acme/model"
WINDOW = 1 << 13
SHARDS = 3


def mixtral_tensors():
    arch = find_map(MIXTRAL)
    rng = np.random.default_rng(0)
    leaves = {
        leaf.name: tuple(map(int, leaf.shape))
        for rule in arch.expand(Facts(MIXTRAL), arch.layouts[0]).rules
        for leaf in sources(rule.expr)
    }
    return {
        name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in leaves.items()
    }


def write_shards(root: Path, config, tensors) -> Path:
    """Tensors dealt out in turn, so that neighbours of the plan lie in different files."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config))
    (root / "tokenizer.json").write_text("{ }\n")
    where = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = dict(list(tensors.items())[number::SHARDS])
        save_file(part, root / file)
        where |= dict.fromkeys(part, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return root


def publish(folder: Path) -> None:
    api = HfApi()
    api.create_repo(REPO, exist_ok=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)


def converted(source, out: Path, *recipes, **settings) -> dict[str, str]:
    """Hashes of everything but the manifest, which names the source."""
    (folder,) = make(source, out, *recipes, **settings)
    found = hashes(folder)
    assert found.pop("conversion.json")
    return found


def streamed(tmp_path: Path, name: str, *recipes, **asked) -> dict[str, str]:
    cache = tmp_path / "cache"
    return converted(REPO, tmp_path / name, *recipes, stream=True, cache=cache, **asked)


def ranges(faults: Faults) -> Counter[str]:
    """How many requests each weight file had."""
    files = (path.rsplit("/", 1)[1] for method, path in faults.requests if method == "GET")
    return Counter(name for name in files if name.endswith(".safetensors"))


def hub_source(folder: Path):
    from converter.source import open_folder

    return open_folder(folder)
