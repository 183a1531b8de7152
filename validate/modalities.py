"""What a release can be asked about besides text, as its config says."""

from collections.abc import Mapping
from typing import Any, Final

_SEEING: Final = ("vision_config", "vit_config", "embd_layer")
_HEARING: Final = ("audio_config", "audio_processor")


def sees(config: Mapping[str, Any]) -> bool:
    """Whether the release takes pictures."""
    return _has(config, _SEEING)


def hears(config: Mapping[str, Any]) -> bool:
    """Whether the release takes sounds."""
    return _has(config, _HEARING)


def _has(config: Mapping[str, Any], parts: tuple[str, ...]) -> bool:
    """Whether one of the parts is there; omni releases keep what listens in a thinker."""
    inner = config.get("thinker_config")
    places = (config, inner) if isinstance(inner, Mapping) else (config,)
    return any(place.get(part) for place in places for part in parts)
