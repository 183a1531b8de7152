"""What a run of the converter is asked for, and what it holds once planned and converted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from arch_maps.registry import ArchMap
from converter.adapter import Fusion
from converter.adapter.torch_folder import fused_folder
from converter.decode import View
from converter.execute.parts import Part
from converter.kv import KvAsked
from converter.manifest import Manifest
from converter.maps import WRITTEN, MapChoice
from converter.plan import Options, Plan
from converter.release import Release
from converter.source import Source


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of the converter, as the command line states it."""

    hf_path: str
    mlx_path: Path | None = None
    revision: str | None = None
    gguf: str | None = None
    """The GGUF file to convert, where there are several or other weights beside it."""
    recipes: tuple[Options, ...] = (Options(),)
    """One per output; all are written from one read of the source."""
    names: tuple[str, ...] = ()
    """Folders of the outputs below ``mlx_path``, one for each recipe; derived where empty."""
    dequantize: bool = False
    overwrite: bool = False
    keep_judged: bool = False
    """Whether this goes on with outputs that are finished and judged, for their cards and repos."""
    replace_others: bool = False
    """Whether what is in the way of an output goes; for a caller whose folders they are."""
    workers: int | None = None
    calibration_data: Path | None = None
    """Text of the calibrated methods; None for the built-in one."""
    trust_remote_code: bool = False
    maps: MapChoice = WRITTEN
    adapter_path: Path | None = None
    """LoRA or DoRA that is fused into the release."""
    mtp: bool = False
    """Whether the release's further-token layers become a drafter beside each output."""
    kv: KvAsked | None = None
    """What is asked of the KV cache, so that it is refused now where it cannot be."""
    command: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)
    """By a plan's hash, for outputs that tell one of their own."""
    cache: Path | None = None
    """Where files from the hub go; None for the client's own cache."""
    part: Part | None = None
    """The shards to make, where other processes make the others in the same folder."""
    stream: bool = False
    """Whether weights are read from the hub while converting, instead of downloaded before."""

    @property
    def thread_count(self) -> int:
        """Worker threads; more than eight gain nothing from one disk."""
        return self.workers or min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A release with the plans of all requested outputs."""

    release: Release
    source: Source
    """The release's tensors, its own quantization decoded and an adapter fused in."""
    plans: tuple[Plan, ...]
    view: View
    """How that decoding is done."""
    arch: ArchMap
    fusion: Fusion | None = None
    drafters: tuple[Plan, ...] = ()
    """One beside each plan, or none at all."""
    kv: tuple[str, ...] = ()
    """Which layers' caches will be quantized and which not, where that was asked."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A finished output folder."""

    plan: Plan
    manifest: Manifest
    folder: Path
    release: Release
    arch: ArchMap
    target: Path | None = None
    """The output that this one drafts for."""
    fusion: Fusion | None = None
    reused: bool = False
    """Whether an earlier run made it."""

    def reference(self, *, workers: int) -> AbstractContextManager[Path]:
        """The torch checkpoint that the output must compute like: the release, or it fused."""
        if self.fusion is None:
            return nullcontext(self.release.local())
        return fused_folder(self.release, self.fusion, beside=self.folder, workers=workers)
