"""GGUF files written by hand, field by field, so that any of them can lie."""

import struct

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
SETTINGS = {
    "general.architecture": (STRING, "llama"),
    "llama.embedding_length": (U32, 64),
    "llama.block_count": (U32, 1),
    "llama.feed_forward_length": (U32, 128),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-6),
    "llama.context_length": (U32, 128),
    "tokenizer.ggml.model": (STRING, "gpt2"),
}
SHAPES = {
    "token_embd.weight": (96, 64),
    "output_norm.weight": (64,),
    "output.weight": (96, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (128, 64),
    "blk.0.ffn_up.weight": (128, 64),
    "blk.0.ffn_down.weight": (64, 128),
}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value):
    codes = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}
    head = text(key) + struct.pack("<I", kind)
    if kind == STRING:
        return head + text(value)
    if kind == ARRAY:
        inner, values = value
        body = b"".join(
            text(v) if inner == STRING else struct.pack(codes[inner], v) for v in values
        )
        return head + struct.pack("<IQ", inner, len(values)) + body
    return head + (struct.pack(codes[kind], value) if kind in codes else value)


class File:
    """A GGUF file in parts, any of which may be spoilt before it is written."""

    def __init__(self, settings=None, tensors=None, *, align=32):
        self.entries = [entry(k, *v) for k, v in (settings or SETTINGS).items()]
        self.tensors = []
        self.data = b""
        self.align = align
        self.version = 3
        self.counts = [None, None]
        rng = np.random.default_rng(0)
        for name, shape in (SHAPES if tensors is None else tensors).items():
            values = rng.standard_normal(shape).astype(np.float32).tobytes()
            self.tensors.append([name, shape, 0, len(self.data)])
            self.data += values + bytes(-len(values) % align)

    def head(self):
        tensors = b""
        for name, shape, kind, offset in self.tensors:
            tensors += text(name) + struct.pack("<I", len(shape))
            tensors += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack(
                "<IQ", kind, offset
            )
        counts = [len(self.tensors), len(self.entries)]
        counts = [
            own if own is not None else real for own, real in zip(self.counts, counts, strict=True)
        ]
        return (
            b"GGUF" + struct.pack("<IQQ", self.version, *counts) + b"".join(self.entries) + tensors
        )

    def write(self, path, *, cut=None, tail=b""):
        head = self.head()
        whole = head + bytes(-len(head) % self.align) + self.data + tail
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole[:cut])
        return path


def settings(**changes):
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**SETTINGS, **named}.items() if value is not None}


def llama3_scaling(factor):
    made = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return made | {"rope_type": "llama3", "original_max_position_embeddings": 8192}


def llama3_factors(factor):
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**llama3_scaling(factor), "rope_theta": 5e5}
    config = LlamaConfig(head_dim=32, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    return (plain / scaled).numpy().tobytes()


def llama3_file(factor):
    shapes = {"rope_freqs.weight": (16,), **SHAPES}
    file = File(settings(llama__rope__freq_base=(F32, 5e5)), shapes)
    file.data = llama3_factors(factor) + file.data[64:]
    return file
