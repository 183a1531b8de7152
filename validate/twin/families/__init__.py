"""Additions per model type; a type that is not listed takes the plain text-only family."""

from validate.twin.families import bert, llama, minicpmv4_6, qwen, qwen_vl
from validate.twin.family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "llama": llama.FAMILY,
    "minicpmv4_6": minicpmv4_6.FAMILY,
    "mistral": llama.FAMILY,
    "qwen2_5_vl": qwen_vl.QWEN2_VL,
    "qwen2_vl": qwen_vl.QWEN2_VL,
    "qwen3": qwen.TEXT,
    "qwen3_5": qwen.QWEN3_5,
    "qwen3_5_text": qwen.TEXT,
}


def family_of(model_type: str) -> Family:
    """The family of ``model_type``, or the plain text-only one."""
    return FAMILIES.get(model_type, Family())
