"""Gemma 4 text models, such as the text stack of a multimodal release by itself."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma4

_STATED: Final = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
"""What a release of its own states; a multimodal one leaves it to the reference."""
_DEFAULTS: Final = {k: v for k, v in gemma4.DEFAULTS.items() if k not in _STATED}


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = gemma4.sizes(facts.filled(_DEFAULTS))
    gemma4.stack(root / "model", s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    out.update(gemma4.spell_config(facts.filled(_DEFAULTS)))
    out.pop("per_layer_config", None)
    return out


MAP = ArchMap(
    model_type="gemma4_text",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma4",),
)
