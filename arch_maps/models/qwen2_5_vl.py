"""Qwen2.5-VL: Qwen2's text stack and a vision tower with windowed attention."""

from __future__ import annotations

from arch_maps.models import qwen2_vl
from arch_maps.vision import qwen2_vit

MAP = qwen2_vl.release("qwen2_5_vl", qwen2_vit.qwen2_5_tower, qwen2_vit.spell_qwen2_5)
