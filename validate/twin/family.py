"""What a twin needs to know about a model type beyond its config: tokens, template, processor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

Json = dict[str, Any]
Files = dict[str, Json]

CHAT_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def unchanged(config: Json, source: Json) -> Json:
    """Leave the shrunk ``config`` as the field rules made it."""
    del source
    return config


def no_files(config: Json) -> Files:
    """No processor files: the architecture sees text only."""
    del config
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Per-type additions to the generic shrinker; the defaults suit any text-only decoder.

    ``template`` replaces ChatML, with the same places for pictures; "" leaves it out.
    ``tokens`` names the special token behind a config field (``image_token_id``), ``named_tokens``
    the attributes a tokenizer must carry (``image_token``), ``pinned`` the dotted config paths that
    keep the source's value, each with the reason.  ``adjust(shrunk, source)`` finishes the config
    and ``processor(shrunk)`` gives the processor's files, where no field name can say what to do.
    """

    tokenizer: str = "byte_bpe"
    tokenizer_class: str = "PreTrainedTokenizerFast"
    add_bos: bool = False
    silent_bos: str | None = None
    """A begin-of-text token that the tokenizer has but does not put before a prompt."""
    specials: tuple[str, ...] = CHAT_TOKENS
    tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    named_tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    stop_tokens: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    template: str | None = None
    image_markup: str | None = None
    video_markup: str | None = None
    audio_markup: str | None = None
    in_code: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Token ids that the release's code has and its config leaves out, by the field that a twin,
    whose ids are others, states them in."""
    pinned: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    gains: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Factors by the ends of tensor names, where what is drawn would make attention or routing
    sharper or flatter than any trained one."""
    by_map: bool = False
    """Whether weights are drawn from the map although transformers has the class, because that
    cannot be built whole without a further library, or no longer holds all that releases do."""
    adjust: Callable[[Json, Json], Json] = unchanged
    processor: Callable[[Json], Files] = no_files

    @property
    def sees_images(self) -> bool:
        """Whether prompts of this family may hold images."""
        return self.image_markup is not None
