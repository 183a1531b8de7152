"""Twins of quantized releases: a plain twin with its matrices packed as each format packs them.

Written out plainly, one word at a time where that shows the layout; nothing here is shared with
the decoders.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from validate.twin import load_example, make_twin

GROUP = 64
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def nearest(weight, scales, values):
    """Codes of the nearest value, (out, in), with (out, groups) scales."""
    scaled = weight / scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return (scaled[..., None] - values).abs().argmin(-1).to(torch.uint8)


def integer_codes(weight, bits, group, *, symmetric):
    """(codes, scales, zeros): unsigned codes of float16 scales."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        scales = (torch.maximum(-low, high) / (2 ** (bits - 1) - 1)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = ((high - low) / (2**bits - 1)).half()
        zeros = torch.round(-low / scales.float()).clamp(1, 2**bits - 1)
    wide = scales.float().repeat_interleave(group, 1)
    codes = torch.round(weight / wide) + zeros.float().repeat_interleave(group, 1)
    return codes.clamp(0, 2**bits - 1).to(torch.int32), scales, zeros.to(torch.int32)


def words(codes, order=range(8)):
    """Eight 4-bit codes of each row to a word; ``order`` names the code of each nibble."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for place, column in enumerate(order):
        packed |= codes[:, column::8].to(torch.int32) << (4 * place)
    return packed


def fp8(name, weight, *, powers=False):
    out, inp = weight.shape
    scales = torch.zeros(-(-out // 128), -(-inp // 128))
    codes = torch.zeros(out, inp, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = weight[rows, columns].abs().amax() / 448
            scales[i, j] = 2.0 ** torch.ceil(torch.log2(scale)) if powers else scale
            codes[rows, columns] = (weight[rows, columns] / scales[i, j]).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}


def fp8_powers(name, weight):
    return fp8(name, weight, powers=True)


def awq(name, weight):
    codes, scales, zeros = integer_codes(weight, 4, GROUP, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = {"qweight": words(codes.T, order), "qzeros": words(zeros.T, order)}
    return {f"{name}.{k}": v.contiguous() for k, v in {**packed, "scales": scales.T}.items()}


def gptq(name, weight):
    codes, scales, zeros = integer_codes(weight, 4, GROUP, symmetric=True)
    packed = {
        "qweight": words(codes).T,
        "qzeros": words((zeros - 1).T),
        "scales": scales.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return {f"{name}.{k}": v.contiguous() for k, v in packed.items()}


def ct_int4(name, weight):
    codes, scales, _ = integer_codes(weight, 4, 32, symmetric=True)
    return {
        f"{name}.weight_packed": words(codes),
        f"{name}.weight_scale": scales.to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def nf4(name, weight):
    flat = weight.reshape(-1, 64)
    absmax = flat.abs().amax(1, keepdim=True)
    codes = nearest(flat, absmax, torch.tensor(NF4)).reshape(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*weight.shape]}
    return {
        f"{name}.weight": ((codes[0::2] << 4) | codes[1::2])[:, None],
        f"{name}.weight.absmax": absmax.reshape(-1),
        f"{name}.weight.quant_map": torch.tensor(NF4),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def mxfp4(name, weight):
    """Experts [experts, in, out] as gpt-oss packs them: blocks along the input."""
    rows = weight.transpose(1, 2).reshape(-1, weight.shape[1])
    exponents = torch.ceil(torch.log2(rows.reshape(rows.shape[0], -1, 32).abs().amax(-1) / 6))
    codes = nearest(rows, 2.0**exponents, E2M1)
    shape = (weight.shape[0], weight.shape[2], weight.shape[1] // 32)
    return {
        f"{name}_blocks": (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(*shape, 16),
        f"{name}_scales": (exponents + 127).to(torch.uint8).reshape(shape),
    }


FORMATS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8-ue8m0": (
        fp8_powers,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    ),
    "ct-int4": (
        ct_int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": 32,
                    },
                }
            },
        },
    ),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}),
}


def quantized_twin(model_type: str, format: str, folder: Path, *, dtype: str = "bfloat16") -> Path:
    """A twin whose projections are packed in ``format``; the plain one is beside it."""
    plain = folder / f"{model_type}-plain"
    if not plain.exists():
        make_twin(load_example(model_type), plain, dtype=dtype)
    out = folder / f"{model_type}-{format}"
    shutil.copytree(plain, out)
    pack, settings = FORMATS[format]
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if format == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            tensors |= pack(name, weight.float())
        elif format != "mxfp4" and name.endswith(("proj.weight", "proj_with_mqa.weight")):
            tensors |= pack(name.removesuffix(".weight"), weight.float())
        else:
            tensors[name] = weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = settings
    (out / "config.json").write_text(json.dumps(config))
    return out
