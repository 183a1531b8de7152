"""Where a transformers class leaves out what its release computes, put back in memory.

Only documented omissions of classes that compose a text stack without its head's scale; a
reference that lacks it would call the right logits wrong by a constant factor.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from validate import nemotron_omni

_HEAD_SCALES: Final[Mapping[tuple[str, str], tuple[str, int]]] = {
    ("aya_vision", "cohere2"): ("logit_scale", 1),
    ("cohere2_vision", "cohere2"): ("logit_scale", 1),
    ("llava_next", "granite"): ("logits_scaling", -1),
}
"""(model_type, text model_type) -> the text config's scale of the logits, and its exponent."""


_ALL_SHARED: Final[Mapping[str, str]] = {
    "gemma4_assistant": "Gemma4TextConfig",
    "gemma4_unified_assistant": "Gemma4UnifiedTextConfig",
}
"""Drafters, and the text config that refuses what their own config demands of it."""


_BY_TIMM: Final[Mapping[str, tuple[str, str]]] = {
    "gemma3n": ("gemma3n_vision", "model.vision_tower."),
}
"""Types, and of their part that only timm can build the model_type and the start of its names."""


_RENAMED: Final[Mapping[str, tuple[str, str, str]]] = {
    "nemotron_h_omni": (
        "NemotronH_Omni_Reasoning_V3",
        r"^vision_projector\.vision_final_layernorm\.",
        r"vision_final_layernorm\.",
    ),
}
"""Types, and of their class a part that its releases call otherwise than it does."""


_UNREAD: Final = ("num_batches_tracked", "vision_model.summary_idxs")
"""Ends of the names of saved integers that do without a release: a counter of training, and which
tokens sum up a picture, which follows from the config and is not asked for here."""


def needless(name: str) -> bool:
    """Whether a class computes the same without the tensor, though it saves one of that name."""
    return name.endswith(_UNREAD)


def lighten(model: Any) -> None:
    """Rid a class that is built without weights of those that no release has."""
    if model.config.model_type == "nemotron_h_omni":
        nemotron_omni.lighten(model)


def unbuilt(model_type: str) -> str:
    """Start of the names of the tensors that the class is built without here; "" for none."""
    missing = model_type in _BY_TIMM and find_spec("timm") is None
    return _BY_TIMM[model_type][1] if missing else ""


def mend(model_type: str) -> None:
    """Make a class of transformers buildable that contradicts itself, for this process.

    5.23.0 wants every layer of these drafters to share the keys and values of another model, and
    rejects a stack whose layers all share them. 5.23.0 does not know what releases call the norm
    after C-RADIO's tower, and silently leaves it as it was made. 5.24.0 asks the answer of Llama
    4's text stack for the pictures' features, which it does not have. Where timm is missing, a
    class whose tower comes from there is built without that tower, and answers nothing about
    pictures.
    """
    if model_type in _RENAMED:
        _rename(*_RENAMED[model_type])
    if model_type == "llama4":
        outputs: Any = import_module("transformers.modeling_outputs")
        if not hasattr(outputs.MoeCausalLMOutputWithPast, "image_outputs"):
            outputs.MoeCausalLMOutputWithPast.image_outputs = None
    if unbuilt(model_type):
        _leave_out(_BY_TIMM[model_type][0])
    if model_type not in _ALL_SHARED:
        return
    import transformers

    cls = getattr(transformers, _ALL_SHARED[model_type])
    stock = cls.kv_sharing_modes.fget
    if stock.__module__ == __name__:
        return

    def modes(self: Any) -> list[str | None]:
        count = self.num_hidden_layers
        if self.num_kv_shared_layers == count:
            return ["reuse"] * count
        found: list[str | None] = stock(self)
        return found

    cls.kv_sharing_modes = property(modes)


def _rename(owner: str, source: str, target: str) -> None:
    loading: Any = import_module("transformers.core_model_loading")
    known: Any = import_module("transformers.conversion_mapping")
    rules = known.get_checkpoint_conversion_mapping(owner)
    if not any(source in rule.source_patterns for rule in rules):
        rules.append(loading.WeightRenaming(source, target))
        known.register_checkpoint_conversion_mapping(owner, rules, overwrite=True)


def _leave_out(part: str) -> None:
    torch: Any = import_module("torch")
    module: Any = import_module("transformers.models.gemma3n.modeling_gemma3n")
    stock = module.AutoModel
    if stock.__module__ == __name__:
        return

    class AutoModel:
        """The automatic class, but for the part."""

        @staticmethod
        def from_config(config: Any, **settings: Any) -> Any:
            if config.model_type == part:
                return torch.nn.Module()
            return stock.from_config(config, **settings)

    module.AutoModel = AutoModel


def complete(model: Any) -> str:
    """Scale the logits of a loaded model as its text stack does; what was done, or "" """
    config = model.config
    if config.model_type == "nemotron_h_omni":
        nemotron_omni.watch(model)
    text = getattr(config, "text_config", None)
    key = (str(config.model_type), str(getattr(text, "model_type", "")))
    if key not in _HEAD_SCALES:
        return ""
    name, exponent = _HEAD_SCALES[key]
    scale = float(getattr(text, name)) ** exponent
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * scale)
    return f"{type(model).__name__} leaves out the text stack's {name}; put back in memory"
