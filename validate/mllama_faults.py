"""Llama 3.2 Vision's cross-attention as the release has it, in a loaded mlx-vlm model."""

from collections.abc import Mapping
from typing import Any

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def crossing(model: Any, config: Config) -> list[Patch]:
    """Layers that rest without a picture, and remember after the prompt which tiles are padding."""
    stack = model.language_model.model
    places = config["text_config"]["cross_attention_layers"]
    layers = [
        _Crossing(layer) if index in places else layer for index, layer in enumerate(stack.layers)
    ]
    return [(stack, "layers", layers)]


class _Crossing:
    """A cross-attention layer; single tokens after a prompt see what its last token saw."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: tuple[Any, Any] = (None, None)

    def __call__(
        self,
        hidden_states: Any,
        *,
        cross_attention_states: Any = None,
        attention_mask: Any = None,
        full_text_row_masked_out_mask: Any = None,
        cache: Any = None,
    ) -> Any:
        if cross_attention_states is None:
            return hidden_states
        rows = full_text_row_masked_out_mask
        if attention_mask is None:
            attention_mask, rows = self.seen
        else:
            self.seen = (attention_mask[:, :, -1:], rows[:, :, -1:])
        return self.inner(
            hidden_states,
            cross_attention_states=cross_attention_states,
            attention_mask=attention_mask,
            full_text_row_masked_out_mask=rows,
            cache=cache,
        )
