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

_PICTURES: Final = "it makes pictures or videos, which no check judges"
_MEASURES: Final = "it measures or marks pictures, which no check judges"
_DECIDES: Final = "it decides or extracts by a head of its own, which no check judges"
_VECTORS: Final = "it gives a vector for each token of a text or a picture, which no check judges"
_STEPS: Final = (
    "it writes by diffusion, where every check here steps token by token; not written yet"
)
_SPEAKS: Final = "it speaks, which no check judges; not written yet"
_UNWRITTEN: Final = "not written yet; --map runtime follows the runtime's loader"

RUNTIME_ONLY: Final[dict[str, str]] = {
    "baichuan_m1": "the runtime divides each row of the head by its norm at every load, so that no "
    "file is loaded as written",
    "joyai_llm_flash": "DeepSeek V3's architecture, but for a further-token layer without experts; "
    "not written yet",
    "llava_qwen2": "FastVLM's tower has its sizes in the runtime's code, so that its smallest twin "
    "is half a gigabyte; not written yet",
    "phi3_v": "its tower has its sizes in the runtime's code, so that its smallest twin is over a "
    "gigabyte; not written yet",
    "prism_hadamard_qwen35": "it is a checkpoint of MLX's own, already rotated and quantized",
    **dict.fromkeys(
        (
            *("bonsai", "ernie_image", "flux2", "flux3", "ideogram4", "llada_image", "mage_flow"),
            *("ming_image", "minimax_h3", "moss_image", "qwen_image", "z_image"),
        ),
        _PICTURES,
    ),
    **dict.fromkeys(
        (
            *("falcon-perception", "falcon_perception", "indic_ocr", "locateanything", "moge3"),
            *("rf-detr", "rfdetr", "sam3.1_video", "sam3_1", "sam3d_body", "sam3d_objects"),
            *("video_depth_anything", "yolo11"),
        ),
        _MEASURES,
    ),
    **dict.fromkeys(("clef", "d1", "d1_omni", "decider2", "gliner2_5", "laya"), _DECIDES),
    **dict.fromkeys(("colidefics3", "colqwen2_5", "lfm2_colbert"), _VECTORS),
    **dict.fromkeys(("llada2_moe", "nemotron_labs_diffusion"), _STEPS),
    "muse_spark_open": "its runtime module needs Metal",
    "nemotron_voicechat": _SPEAKS,
    **dict.fromkeys(
        (
            *("afm7", "bailing_moe_v3", "bunny-llama", "deepseek_v41", "deepseek_v41_text", "gear"),
            *("k2_horizon", "kimi_k3", "lfm2_encoder", "limite", "llama_nemotron_vl_embedding"),
            *("llmjpvl", "longcat_flash_ngram", "longcat_flash_sparse", "mage_vl", "mimo_v2"),
            *("minimax_m3", "mistral_large3", "multi_modality", "nemotron_h_puzzle"),
            *("nemotron_parse", "phi-msft", "phi3small", "phixtral", "plamo2vl"),
            *("qwen3_vl_embedding", "xing4_0", "youtu_vl", "z1t", "zaya1_vl"),
        ),
        _UNWRITTEN,
    ),
}
"""model_type -> reason, of every other type that a stock runtime has a package or a name for."""
