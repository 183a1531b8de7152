"""A quantized torch release as the plain one: a folder that transformers loads and runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arch_maps.ops import Source as Leaf
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Rule
from converter.decode import DecodingReader, View, decoded, quantization_settings
from converter.execute import Job, execute
from converter.plan import Options, Plan
from converter.plan.build import assemble, pending_tensors
from converter.plan.model import Output
from converter.scratch import scratch
from converter.sidecars import copy_sidecars, list_sidecars, write_json
from converter.source import open_folder


@contextmanager
def plain_release(
    folder: Path, *, beside: Path, arch: ArchMap | None = None, workers: int = 2
) -> Iterator[Path]:
    """The torch release in ``folder``, decoded into a folder next to ``beside``.

    The same folder where it is not quantized; else one that is gone afterwards. Nothing is renamed:
    the tensors are those of the unquantized release, in the dtype that it declares.
    """
    source = open_folder(folder)
    if quantization_settings(source.config) is None:
        yield folder
        return
    view = decoded(source, arch=arch)
    plan = _plan(view)
    with scratch("plain", beside) as place:
        made = place / folder.resolve().name  # what reports call the reference
        made.mkdir()
        with source.open() as raw:
            reader = DecodingReader(raw, view)
            execute([Job(plan, made)], view.source, reader=reader, stamp={}, workers=workers)
        copy_sidecars(folder, list_sidecars(folder), made)
        write_json(made / "config.json", plan.config)
        write_json(made / "model.safetensors.index.json", plan.index())
        yield made


def _plan(view: View) -> Plan:
    outputs = []
    for info in view.source.tensors.values():
        rule = Rule(info.name, Leaf(info.name, info.shape), Kind.LINEAR, "text")
        stored = pending_tensors(info.name, info.shape, info.dtype, None)
        outputs.append(Output(rule, info.dtype, None, stored))
    return assemble(
        view.source,
        outputs,
        model_type=str(view.source.config.get("model_type")),
        layout="plain",
        drops=view.drops,
        options=Options(target="torch"),
        config=dict(view.source.config),
        notes=(),
        origin=None,
        metadata={"format": "pt"},
    )
