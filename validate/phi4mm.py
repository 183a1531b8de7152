"""Phi-4 Multimodal as transformers has it: ``Phi4MultimodalForCausalLM`` for ``Phi4MMForCausalLM``.

The class has no adapters: transformers leaves those to another library. The release has two in
every matrix of its text stack, and which one counts follows from the prompt: that for pictures
where there is a picture, that for speech where there are only sounds, none for text alone. They
are added here beside the matrices, as the release's own code adds them.

In two places transformers 5.23 departs from the release's code, and is put right in memory: its
tower attends backwards only where no patch is masked, because the mask is then left out of a module
that is marked causal; and its last mel filter takes in one bin more, that at the highest frequency.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.models import phi4mm as release

ADAPTERS: Final = ("vision", "speech")
_TEXT: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
    *("original_max_position_embeddings", "tie_word_embeddings", "sliding_window"),
    *("rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
NAMES: Final = {
    r"\.base_layer\.": ".",
    r"img_projection\.0\.": "img_projection_up.",
    r"img_projection\.2\.": "img_projection_down.",
    r"glb_GN$": "global_img_feature_extensor",
    r"sub_GN$": "sub_img_feature_extensor",
    r"audio_projection\.speech\.0\.": "up_proj_for_speech.",
    r"audio_projection\.speech\.2\.": "down_proj_for_speech.",
    r"audio_projection\.vision\.0\.": "up_proj_for_vision_speech.",
    r"audio_projection\.vision\.2\.": "down_proj_for_vision_speech.",
    r"\.net\.0\.linear\.": ".gate_up_proj.",
    r"\.net\.2\.": ".down_proj.",
    r"self_attn\.linear_q\.": "self_attn.q_proj.",
    r"self_attn\.linear_k\.": "self_attn.k_proj.",
    r"self_attn\.linear_v\.": "self_attn.v_proj.",
    r"self_attn\.linear_out\.": "self_attn.o_proj.",
}
PARTS: Final = {
    "image_processor": "Phi4MultimodalImageProcessor",
    "audio_processor": "Phi4MultimodalFeatureExtractor",
}
TOKENS: Final = {"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"}
_HIGHEST: Final = 7690
"""Frequency in Hz whose bin, and all above it, no filter takes in."""
_MARKUP: Final = {r"<\|image_\d+\|>": "<|endoftext10|>", r"<\|audio_\d+\|>": "<|endoftext11|>"}


def torch_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The release's config.json in the terms of ``Phi4MultimodalConfig``."""
    facts = Facts(config)
    vision, audio = release.seeing(facts), release.hearing(facts)
    seen = config["embd_layer"]["image_embd_layer"]
    image_token = picture_token(config)
    audio_token = int(facts.size("audio_token_index", release.AUDIO_TOKEN))
    heard = audio.data
    return {
        **{name: config[name] for name in _TEXT if name in config},
        "model_type": "phi4_multimodal",
        # Where text alone ends that was to say something of a picture or a sound.
        "image_token_id": image_token,
        "audio_token_id": audio_token,
        "vision_config": {
            **{name: value for name, value in vision.data.items() if name != "model_type"},
            "crop_size": seen["crop_size"],
            "image_token_id": image_token,
        },
        "audio_config": {
            "hidden_size": heard["attention_dim"],
            "intermediate_size": heard["linear_units"],
            "num_attention_heads": heard["attention_heads"],
            "nemo_conv_channels": heard["nemo_conv_settings"]["conv_channels"],
            "depthwise_separable_out_channel": heard["depthwise_seperable_out_channel"],
            "bias_max_distance": heard["relative_attention_bias_args"]["t5_bias_max_distance"],
            "audio_token_id": audio_token,
            **{
                name: heard[name]
                for name in (
                    *("num_blocks", "activation", "chunk_size", "left_chunk", "input_size"),
                    *("ext_pw_out_channel", "depthwise_multiplier", "kernel_size"),
                    *("conv_activation", "conv_glu_type", "time_reduction"),
                )
            },
        },
    }


def picture_token(config: Mapping[str, Any]) -> int:
    """The token that stands for a piece of a picture."""
    return int(Facts(config).size("image_token_index", release.IMAGE_TOKEN))


def read_adapters(folder: Path, framework: str) -> dict[str, Any]:
    """The adapters' tensors by the names of the release in ``folder``; ValueError for none."""
    return read_tensors(folder, framework, (".lora_A.", ".lora_B."))


def read_tensors(folder: Path, framework: str, words: Sequence[str]) -> dict[str, Any]:
    """A release's tensors with one of ``words`` in their names; ValueError where one finds none."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework=framework) as file:
            names = [name for name in file.keys() if any(word in name for word in words)]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    lacking = [word for word in words if not any(word in name for name in found)]
    if lacking:
        raise ValueError(f"{folder}: no tensor named {lacking[0]!r} is in its safetensors files")
    return found


def scales(config: Mapping[str, Any]) -> dict[str, float]:
    """What each adapter's product is multiplied by: alpha / rank."""
    sections = {kind: config[f"{kind}_lora"] for kind in ADAPTERS}
    return {kind: float(each["lora_alpha"]) / each["r"] for kind, each in sections.items()}


def complete(model: Any, folder: Path) -> None:
    """Let each forward of a loaded class add the adapter that its prompt asks for, and see whole.

    Each forward must come with everything the prompt holds, as it does where the sequence is
    computed anew for every token; a cached step does not tell what came before it.
    """
    from validate.reference import read_config

    weights, factors = read_adapters(folder, "pt"), scales(read_config(folder))
    active: list[str | None] = [None]

    def choose(_model: Any, _given: Any, inputs: Mapping[str, Any]) -> None:
        seen = inputs.get("image_pixel_values") is not None
        heard = inputs.get("audio_input_features") is not None
        active[0] = "vision" if seen else "speech" if heard else None

    def adapted(name: str, dtype: Any) -> Any:
        pairs = {
            kind: [weights[f"{name}.lora_{half}.{kind}.weight"].to(dtype) for half in "AB"]
            for kind in ADAPTERS
        }

        def add(_module: Any, inputs: Any, output: Any) -> Any:
            if active[0] is None:
                return output
            down, up = pairs[active[0]]
            return output + (inputs[0] @ down.T) @ up.T * factors[active[0]]

        return add

    for name, module in model.named_modules():
        if f"{name}.lora_A.vision.weight" in weights:
            module.register_forward_hook(adapted(name, module.weight.dtype))
    model.register_forward_pre_hook(choose, with_kwargs=True)
    for layer in model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False


def processor() -> type:
    """transformers' processor, which the release's numbered marks are translated for."""
    transformers: Any = import_module("transformers")

    class Phi4MMProcessor(transformers.Phi4MultimodalProcessor):  # type: ignore[misc]
        """The class, taking ``<|image_1|>`` and ``<|audio_1|>`` as the release's own does."""

        def __init__(
            self, image_processor: Any, audio_processor: Any, tokenizer: Any, **settings: Any
        ) -> None:
            super().__init__(image_processor, audio_processor, tokenizer, **settings)
            bins = audio_processor.n_fft / audio_processor.sampling_rate
            audio_processor.mel_filters[int(_HIGHEST * bins + 0.5) :] = 0

        def __call__(self, images: Any = None, text: Any = None, **settings: Any) -> Any:
            for mark, token in _MARKUP.items():
                text = [re.sub(mark, token, one) for one in text]
            return super().__call__(images=images, text=text, **settings)

    return Phi4MMProcessor
