"""The fused release as a torch checkpoint: what the reference and the calibration run on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arch_maps.ops import Source as Leaf
from arch_maps.rules import Kind, Rule
from converter.adapter.fusing import Fusion
from converter.execute import Job, execute
from converter.plan import Options
from converter.plan.build import assemble, pending_tensors
from converter.plan.model import Output
from converter.release import Release
from converter.scratch import scratch
from converter.sidecars import copy_sidecars


@contextmanager
def fused_folder(
    release: Release, fusion: Fusion, *, beside: Path, workers: int = 2
) -> Iterator[Path]:
    """A folder with the release's tensors under their own names, fused ones as float32.

    It lies hidden beside the output ``beside`` and goes with the context.
    """
    outputs = []
    for name, info in fusion.source.tensors.items():
        rule = Rule(name, Leaf(name, info.shape), Kind.STATE, "text")
        stored = pending_tensors(name, info.shape, info.dtype, None)
        outputs.append(Output(rule, info.dtype, None, stored))
    plan = assemble(
        fusion.source,
        outputs,
        model_type=str(fusion.source.config.get("model_type")),
        layout="torch",
        drops=(),
        options=Options(target="torch"),
        config=fusion.source.config,
        notes=fusion.source.notes,
        origin=None,
        metadata={"format": "pt"},
    )
    with scratch("fused", beside) as folder:
        with release.source.open() as raw, fusion.open(raw) as rows:
            execute([Job(plan, folder)], fusion.source, reader=rows, stamp={}, workers=workers)
        for file, data in (
            ("config.json", plan.config),
            ("model.safetensors.index.json", plan.index()),
        ):
            (folder / file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        copy_sidecars(release.local(), release.sidecars, folder)
        yield folder
