"""Kimi K2: DeepSeek V3's architecture under a name of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps.facts import Facts
from arch_maps.models import deepseek_v3


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = deepseek_v3.MAP.config(config, facts)
    # What the runtimes take the name for. Under the release's own one, transformers' tokenizer
    # loader, which both runtimes use, fails on scaled positions.
    return out | {"model_type": deepseek_v3.MAP.model_type}


MAP = replace(deepseek_v3.MAP, model_type="kimi_k2", config=_config)
