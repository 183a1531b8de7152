"""Adapters: LoRA and DoRA fused into the release's weights while they are read."""

from converter.adapter.fusing import FusingReader, Fusion, fuse
from converter.adapter.read import Adapter, read_adapter

__all__ = ["Adapter", "FusingReader", "Fusion", "fuse", "read_adapter"]
