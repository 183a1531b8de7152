"""When a row applies: each need looks at declared facts alone and says why not, or nothing."""

import importlib.util
import shutil
from typing import Final

from validate.acceptance.facts import Facts

_CHROMIUMS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KV_GROUPS: Final = (64, 32)
"""Group sizes of uniform KV caches that are tried, largest first."""
THINK: Final = ("<think>", "</think>")
"""The tokens around a thought that both runtimes take by default."""


def writes(facts: Facts) -> str | None:
    """The checkpoint writes text by itself."""
    if facts.writes:
        return None
    return f"a {facts.model_type} writes no text by itself; it is an encoder or a drafter"


def sees(facts: Facts) -> str | None:
    """The checkpoint takes pictures."""
    return None if facts.sees else "config.json has no vision part"


def hears(facts: Facts) -> str | None:
    """The checkpoint takes sounds."""
    return None if facts.hears else "config.json has no audio part"


def chats(facts: Facts) -> str | None:
    """The checkpoint brings a chat template."""
    return None if facts.template else "the checkpoint brings no chat template"


def stops(facts: Facts) -> str | None:
    """The checkpoint says at which tokens to stop."""
    return None if facts.stop_ids else "no config of the checkpoint names an eos_token_id"


def thinks(facts: Facts) -> str | None:
    """The tokenizer has the tokens around a thought, and the template knows of thinking."""
    missing = [token for token in THINK if token not in facts.tokens]
    if missing:
        return f"the tokenizer has no token {' and no token '.join(missing)}"
    return None if "think" in facts.template else "the chat template does not open a thought"


def compared(facts: Facts) -> str | None:
    """A parity report beside the checkpoint tells how torch went on."""
    if facts.torch:
        return None
    return "no parity report beside it tells torch's greedy tokens (convert validate)"


def has_drafter(facts: Facts) -> str | None:
    """A drafter was handed to the run."""
    return None if facts.drafter else "no drafter given (--draft-model DIR)"


def quantizable_cache(facts: Facts) -> str | None:
    """Heads are wide enough for a quantized KV cache."""
    if facts.head_dim is None or any(facts.head_dim % group == 0 for group in KV_GROUPS):
        return None
    groups = " nor by ".join(str(group) for group in KV_GROUPS)
    return f"head_dim {facts.head_dim} is not divisible by {groups}, the group sizes of the cache"


def quantizes_layers(facts: Facts) -> str | None:
    """mlx-vlm quantizes some layer's cache: not the last one's, and none of a sliding window."""
    text = facts.text_config
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        return None
    own = len(kinds) - int(text.get("num_kv_shared_layers") or 0)
    if "full_attention" in kinds[: own - 1]:
        return None
    return (
        "mlx-vlm keeps the cache of the last layer and those of sliding windows in float, and no "
        f"other is left of this model's {own} caches"
    )


def has_browser(facts: Facts) -> str | None:
    """Gradio and a Chromium are installed here."""
    del facts
    if importlib.util.find_spec("gradio") is None:
        return "gradio is not installed here (pip install 'mlx-vlm[ui]')"
    return no_chromium()


def no_chromium() -> str | None:
    """Why no browser can be started here; None where one can."""
    return None if chromium() else f"no Chromium found here (none of {', '.join(_CHROMIUMS)})"


def chromium() -> str | None:
    """Path of a Chromium of this machine."""
    return next((path for name in _CHROMIUMS if (path := shutil.which(name))), None)
