"""Sounds as frames of mel bins, each rounded to one of a few levels with a vector of its own."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

EPSILON: Final = 1e-6
"""The norm's epsilon, which the reference has in code."""


def tower(at: Mount, facts: Facts, hidden: int) -> None:
    """A table of all bins' levels, whose rows are added up, and a norm, below ``at``."""
    rows = facts.size("n_mel_bins", 80) * facts.size("mel_vocab_size", 256)
    table = at.input("encoder.weight", rows, hidden)
    at.rule("embed_audio_tokens.weight", table, Kind.EMBEDDING)
    at.rule("norm.weight", at.input("final_norm.weight", hidden), Kind.NORM)


def spell_config(config: dict[str, Any], facts: Facts, hidden: int) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    why = "the runtime computes it so for this type"
    facts.expect("audio_mode", "dmel", default="dmel", why=why)
    facts.expect("use_audio_norm", True, default=True, why=why)
    facts.expect("bias", False, default=False, why=why)
    config.update(
        model_type="inkling_audio",
        n_mel_bins=int(facts.size("n_mel_bins", 80)),
        mel_vocab_size=int(facts.size("mel_vocab_size", 256)),
        text_hidden_size=hidden,
        rms_norm_eps=EPSILON,
    )
