"""Small releases made by hand, conversions of them in this process, and what folders hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from converter.cli.errors import run
from converter.pipeline import Request, convert
from converter.plan import Options
from converter.ui import Console
from quant.recipe import QuantSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 96,
}
FOUR_BIT = Options(quant=QuantSpec.make("affine", 4, 32))


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def llama_tensors(config: dict[str, Any], dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in llama_shapes(config).items()
    }


def write_release(
    root: Path, config: dict[str, Any] = LLAMA, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """A release with one weight file, and sidecars enough to see them copied."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    (root / "tokenizer.json").write_text("{ }\n")
    save_file(llama_tensors(config) if tensors is None else tensors, root / "model.safetensors")
    return root


def write_adapter(root, config, tensors, file="adapter_model.safetensors"):
    root.mkdir(parents=True, exist_ok=True)
    (root / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, root / file)
    return root


def peft_config(**settings):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base"} | (
        settings
    )


def factors(shape, rank, seed):
    """A [rank, in] and B [out, rank] of a matrix [out, in], large enough to matter."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, shape[1]), np.float32)
    return a, rng.standard_normal((shape[0], rank), np.float32)


def peft_pair(module, a, b):
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def make(source: Path, out: Path, *recipes: Options, **settings: Any) -> list[Path]:
    """Convert in this process; returns the output folders."""
    request = Request(
        hf_path=str(source), mlx_path=out, recipes=recipes or (Options(),), **settings
    )
    return [done.folder for done in convert(request, Console(quiet=True))]


def status(*arguments: str | Path) -> int:
    """The exit status of the command line, run in this process."""
    from converter.cli.app import cli

    return run(lambda: cli.main([str(a) for a in arguments], standalone_mode=False))


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, hidden ones included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
