"""Types that a stock runtime knows and that have no map, and why not."""

from typing import Final

UNMAPPED: Final[dict[str, str]] = {
    "bitnet": "the runtimes take packed ternary weights only, through a Metal kernel",
    "diffusion_gemma": "it writes whole blocks by diffusion, where every check here steps token by "
    "token; not written yet",
    "minimax": "the runtimes' module of that name computes MiniMax-M2, without lightning attention",
    "muse_spark": "its runtime module needs Metal",
    "openai_privacy_filter": "a classifier of tokens, which no check judges",
    "pp_doclayout_v3": "a detector, which no check judges",
    "rt_detr_v2": "the runtime's loader transposes every convolution on each load, so that no file "
    "is loaded as written",
    "sam3": "a segmenter, which no check judges",
    "sam3_video": "a segmenter, which no check judges",
    "sapiens2": "a picture tower whose release processor needs torchvision; not written yet",
}
"""model_type -> reason, of every type that transformers knows as well."""

RUNTIME_ONLY: Final[dict[str, str]] = {
    "baichuan_m1": "the runtime divides each row of the head by its norm at every load, so that no "
    "file is loaded as written",
    "ernie4_5_moe_vl": "not written yet",
    "llava_qwen2": "FastVLM's tower has its sizes in the runtime's code, so that its smallest twin "
    "is half a gigabyte; not written yet",
    "phi3_v": "its tower has its sizes in the runtime's code, so that its smallest twin is over a "
    "gigabyte; not written yet",
}
"""model_type -> reason, of types that people ask for and transformers has no class of."""
