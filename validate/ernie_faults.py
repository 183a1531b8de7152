"""Taking documented faults of ERNIE 4.5 VL out of a loaded model, in memory.

Each function returns patches (module, attribute, what belongs there), given the model and the
checkpoint's config.
"""

from collections.abc import Mapping
from typing import Any, Final

Patch = tuple[Any, str, Any]
_PICTURES: Final = (
    *("im_patch_id", "image_start_token_id", "image_end_token_id"),
    *("video_start_token_id", "video_end_token_id"),
)


def pictures_experts(model: Any, config: Mapping[str, Any]) -> list[Patch]:
    """The experts for pictures, where a token is a picture's or a mark at one of its ends."""
    language = model.language_model
    ids = [config[name] for name in _PICTURES if name in config]
    return [(language, "model", _Typed(language.model, ids))]


class _Typed:
    """The text stack, told which tokens are pictures'."""

    def __init__(self, stock: Any, ids: list[int]) -> None:
        self._stock = stock
        self._ids = ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __call__(self, inputs: Any, *, token_type_ids: Any = None, **given: Any) -> Any:
        import mlx.core as mx

        del token_type_ids  # which no generation of the runtime's sets
        seen = sum(inputs == one for one in self._ids).astype(mx.int32)
        return self._stock(inputs, token_type_ids=seen if seen.any().item() else None, **given)
