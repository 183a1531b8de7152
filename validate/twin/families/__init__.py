"""Additions per model type; a type that is not listed takes the plain text-only family."""

from validate.twin.families import (
    bert,
    dense,
    gemma_vl,
    glm_vl,
    idefics3,
    internvl,
    llama,
    llava,
    minicpmv4_6,
    moe,
    qwen,
    qwen_vl,
)
from validate.twin.family import Family

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(moe.TYPES, moe.FAMILY),
    "bert": bert.FAMILY,
    "gemma3": gemma_vl.GEMMA3,
    "falcon_mamba": dense.MAMBA,
    "glm": dense.PARTIAL,
    "glm4": dense.PARTIAL,
    "glm_ocr": glm_vl.GLM_OCR,
    "gpt_neox": dense.GPT_NEOX,
    "idefics3": idefics3.FAMILY,
    "internvl": internvl.FAMILY,
    "lfm2": dense.LFM2,
    "llama": llama.FAMILY,
    "llava_onevision": llava.ONEVISION,
    "mamba": dense.MAMBA,
    "minicpmv4_6": minicpmv4_6.FAMILY,
    "mistral": llama.FAMILY,
    "modernbert": bert.MODERNBERT,
    "olmo3": dense.OLMO3,
    "paligemma": gemma_vl.PALIGEMMA,
    "phi": dense.PARTIAL,
    "phi3": dense.PHI3,
    "qwen2_5_vl": qwen_vl.QWEN2_VL,
    "qwen2_vl": qwen_vl.QWEN2_VL,
    "qwen3": qwen.TEXT,
    "qwen3_5": qwen.QWEN3_5,
    "qwen3_5_moe": qwen.QWEN3_5,
    "qwen3_5_moe_text": qwen.TEXT,
    "qwen3_5_text": qwen.TEXT,
    "qwen3_moe": qwen.TEXT,
    "qwen3_next": qwen.TEXT,
    "qwen3_vl": qwen.QWEN3_5,
    "qwen3_vl_moe": qwen.QWEN3_5,
    "smolvlm": idefics3.FAMILY,
    "xlm-roberta": bert.XLM_ROBERTA,
}


def family_of(model_type: str) -> Family:
    """The family of ``model_type``, or the plain text-only one."""
    return FAMILIES.get(model_type, Family())
