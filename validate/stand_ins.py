"""Releases with code of their own that transformers has a class for, under another name.

The class computes what the release's code computes; its tensors, its config and its processor are
called otherwise. Everything here is on torch's side: no name of it enters a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from validate import ernie_vl, nemotron_omni, phi4mm


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A class of transformers in place of a release's own."""

    architecture: str
    """The class; what a release calls its own is the key in ``STAND_INS``."""
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The release's config.json as the class's configuration reads it."""
    names: Mapping[str, str]
    """Regular expressions over the release's tensor names, in order, and what the class has."""
    beside: tuple[str, ...]
    """Regular expressions over the names of tensors that the class has no place for."""
    complete: Callable[[Any, Path], None]
    """Adds what these tensors do to the loaded class; raises ValueError."""
    processor: Callable[[], type]
    """The processor's class, made to take the release's prompts."""
    parts: Mapping[str, str]
    """transformers' class of each part of the processor but the tokenizer."""
    tokens: Mapping[str, str]
    """Tokens that the processor looks for on the tokenizer, by the attribute's name."""
    settings: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]] = lambda _: {}
    """What each part of the processor must be told besides the release's files."""


STAND_INS: Final[Mapping[str, StandIn]] = {
    "Ernie4_5_VLMoeForConditionalGeneration": StandIn(
        architecture="Ernie4_5_VLMoeForConditionalGeneration",
        config=ernie_vl.torch_config,
        names={},
        beside=(),
        complete=ernie_vl.complete,
        processor=ernie_vl.processor,
        parts=ernie_vl.PARTS,
        tokens=ernie_vl.TOKENS,
    ),
    "NemotronH_Nano_Omni_Reasoning_V3": StandIn(
        architecture="NemotronH_Omni_Reasoning_V3",
        config=nemotron_omni.torch_config,
        names={},
        beside=nemotron_omni.BESIDE,
        complete=nemotron_omni.complete,
        processor=nemotron_omni.processor,
        parts=nemotron_omni.PARTS,
        tokens={},
        settings=nemotron_omni.settings,
    ),
    "Phi4MMForCausalLM": StandIn(
        architecture="Phi4MultimodalForCausalLM",
        config=phi4mm.torch_config,
        names=phi4mm.NAMES,
        beside=(r"\.lora_[AB]\.",),
        complete=phi4mm.complete,
        processor=phi4mm.processor,
        parts=phi4mm.PARTS,
        tokens=phi4mm.TOKENS,
    ),
}


def stand_in(config: Mapping[str, Any]) -> StandIn | None:
    """What stands in for the class that config.json names; None where none is needed or known."""
    names = config.get("architectures") or [""]
    return STAND_INS.get(str(names[0]))
