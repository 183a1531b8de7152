"""Synthetic releases to convert: Qwen3 shapes, random or zero weights, written by streaming.

Run as a process of its own (``python -m benchmarks.checkpoint``), so that the memory it uses does
not show in the measured processes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TOKENIZER = Path(__file__).parent.parent / "tests" / "fixtures" / "tinylm"
_BLOCK = 4 << 20
_SHARD_BYTES = 4 << 30
_SEED = 20260722
Tensors = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3 text model; ``kv`` is the width of keys and values."""

    hidden: int = 2048
    intermediate: int = 6144
    head_dim: int = 128
    kv: int = 1024
    vocab: int = 4096
    layers: int = 1
    tied: bool = True
    """Whether the embedding is the output projection as well."""

    @classmethod
    def of_bytes(cls, size: float, like: Shape | None = None) -> Shape:
        """``like`` with as many layers as bring its bf16 weights nearest to ``size`` bytes."""
        like = like or cls()
        one, two = (_tensor_bytes(list(replace(like, layers=n).tensors())) for n in (1, 2))
        return replace(like, layers=max(1, round((size - 2 * one + two) / (two - one))))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, as transformers names them."""
        h, i = self.hidden, self.intermediate
        if not self.tied:
            yield "lm_head.weight", (self.vocab, h)
        yield "model.embed_tokens.weight", (self.vocab, h)
        for n in range(self.layers):
            layer = f"model.layers.{n}"
            yield f"{layer}.input_layernorm.weight", (h,)
            yield f"{layer}.mlp.down_proj.weight", (h, i)
            yield f"{layer}.mlp.gate_proj.weight", (i, h)
            yield f"{layer}.mlp.up_proj.weight", (i, h)
            yield f"{layer}.post_attention_layernorm.weight", (h,)
            yield f"{layer}.self_attn.k_norm.weight", (self.head_dim,)
            yield f"{layer}.self_attn.k_proj.weight", (self.kv, h)
            yield f"{layer}.self_attn.o_proj.weight", (h, h)
            yield f"{layer}.self_attn.q_norm.weight", (self.head_dim,)
            yield f"{layer}.self_attn.q_proj.weight", (h, h)
            yield f"{layer}.self_attn.v_proj.weight", (self.kv, h)
        yield "model.norm.weight", (h,)

    def config(self) -> dict[str, object]:
        """config.json of the release."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 4096,
            "model_type": "qwen3",
            "num_attention_heads": self.hidden // self.head_dim,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv // self.head_dim,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
        }


WIDE = Shape(hidden=4096, intermediate=12288, vocab=248320, tied=False)
"""Sizes of Qwen3 8B, with the larger vocabulary of Qwen3.5."""


def of_tensors(count: int) -> tuple[dict[str, object], Tensors]:
    """Config and tensors of a qwen3_5 release grown to ``count`` tensors and a few more.

    Its hybrid text stack and its vision tower have the most tensors a layer of all maps; names
    and shapes are those of the shipped example's map, so only planning can be measured with it.
    """
    from arch_maps.facts import Facts
    from arch_maps.ops import sources
    from arch_maps.registry import find
    from validate.twin import load_example

    arch = find("qwen3_5")
    assert arch is not None

    def grown(depth: int) -> tuple[dict[str, object], Tensors]:
        config = load_example("qwen3_5")
        text, vision = config["text_config"], config["vision_config"]
        period = text["layer_types"][: text["full_attention_interval"]]
        text["num_hidden_layers"] = vision["depth"] = depth
        text["layer_types"] = [period[n % len(period)] for n in range(depth)]
        text["mtp_num_hidden_layers"] = 0
        rules = arch.expand(Facts(config), arch.layouts[0]).rules
        leaves = {leaf.name: leaf.shape for rule in rules for leaf in sources(rule.expr)}
        return config, [(name, tuple(map(int, dims))) for name, dims in sorted(leaves.items())]

    few, more = (len(grown(depth)[1]) for depth in (4, 8))
    return grown(4 * math.ceil((count - few) / (more - few)) + 4)


def make_release(
    folder: Path,
    config: dict[str, object],
    tensors: Tensors,
    *,
    zeros: bool = False,
    bits: bool = False,
) -> int:
    """Write the release and return the bytes of its weights; the same bytes on every machine.

    With ``zeros`` the weight files are holes: any size costs no disk, and reads as zeros. With
    ``bits`` matrices are of random bits, which are made ten times as fast.
    """
    folder.mkdir(parents=True)
    for source in TOKENIZER.iterdir():
        if source.suffix == ".json" and source.name != "config.json":
            shutil.copyfile(source, folder / source.name)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    shards = list(_shards(tensors))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    number = 0
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            if zeros:
                file.truncate(file.tell() + _tensor_bytes(shard))
                continue
            for _, dims in shard:
                make = _random_bits if bits and len(dims) > 1 else _random_bf16
                for block in make(number, math.prod(dims), ones=len(dims) == 1):
                    file.write(block)
                number += 1
    total = _tensor_bytes(tensors)
    if len(shards) > 1:
        owners = {tensor: n for n, s in zip(names, shards, strict=True) for tensor, _ in s}
        index = {"metadata": {"total_size": total}, "weight_map": owners}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _shards(tensors: Tensors) -> Iterator[Tensors]:
    start = filled = 0
    for position, (_, dims) in enumerate(tensors):
        size = 2 * math.prod(dims)
        if filled and filled + size > _SHARD_BYTES:
            yield tensors[start:position]
            start, filled = position, 0
        filled += size
    yield tensors[start:]


def _header(tensors: Tensors) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dims in tensors:
        end = at + 2 * math.prod(dims)
        entries[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _random_bf16(seed: int, count: int, *, ones: bool) -> Iterator[bytes]:
    """Normal values of the usual spread of a weight, around one for norms."""
    import ml_dtypes
    import numpy as np

    random = np.random.Generator(np.random.SFC64([_SEED, seed]))
    for start in range(0, count, _BLOCK):
        values = random.standard_normal(min(_BLOCK, count - start), np.float32)
        values *= np.float32(0.02)
        if ones:
            values += np.float32(1)
        yield values.astype(ml_dtypes.bfloat16).tobytes()


def _random_bits(seed: int, count: int, *, ones: bool) -> Iterator[bytes]:
    """Values of either sign from 2^-7 to 2^-5, all as likely among those of one exponent."""
    import numpy as np

    random = np.random.Generator(np.random.SFC64([_SEED, seed]))
    for start in range(0, count, _BLOCK):
        words = random.integers(0, 1 << 16, min(_BLOCK, count - start), np.uint16)
        words &= 0x80FF
        words |= 0x3C00
        yield words.tobytes()


def _tensor_bytes(tensors: Tensors) -> int:
    return sum(2 * math.prod(dims) for _, dims in tensors)


def main() -> None:
    """Make one release and print the bytes of its weights."""
    parser = argparse.ArgumentParser(description=make_release.__doc__)
    parser.add_argument("folder", type=Path)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--bytes", type=float, help="of a qwen3 release")
    size.add_argument("--tensors", type=int, help="of a qwen3_5 release, all zeros")
    parser.add_argument("--zeros", action="store_true")
    parser.add_argument("--wide", action="store_true", help="wide layers and random bits")
    parser.add_argument("--hidden", type=int, help="width of narrow layers")
    given = parser.parse_args()
    if given.tensors:
        config, tensors = of_tensors(given.tensors)
        print(make_release(given.folder, config, tensors, zeros=True))
        return
    h = given.hidden
    narrow = Shape(hidden=h, intermediate=3 * h, kv=h // 2) if h else Shape()
    shape = Shape.of_bytes(given.bytes, WIDE if given.wide else narrow)
    tensors = list(shape.tensors())
    made = make_release(given.folder, shape.config(), tensors, zeros=given.zeros, bits=given.wide)
    print(made)


if __name__ == "__main__":
    main()
