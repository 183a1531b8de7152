"""Proving a finished output: the runtime against the torch reference, reported beside it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from arch_maps.config import start
from arch_maps.facts import Facts
from arch_maps.ops import RowReader, exact
from arch_maps.registry import ArchMap
from converter.decode import DecodingReader, decoded
from converter.errors import ConvertError, GateError
from converter.execute import Job, execute
from converter.execute.folder import explain
from converter.manifest import read_manifest
from converter.plan import Options, Plan
from converter.plan.back import build_back_plan
from converter.plan.match import find_map, match_release
from converter.sidecars import copy_sidecars, list_sidecars
from converter.source import open_folder
from converter.ui import Console


def prove(
    out: Path,
    *,
    source: Path,
    console: Console,
    plan: Plan | None = None,
    kl_threshold: float | None = None,
    trust_remote_code: bool = False,
    workers: int = 2,
) -> dict[str, Any]:
    """Judge the checkpoint ``out`` against the release in ``source``; the content of parity.json.

    Works on conversions of any origin; with ``plan`` the report vouches for exactly that plan and
    for the files of its manifest. Raises ConvertError when nothing can be judged at all.
    """
    from validate.parity import run_parity
    from validate.reference import ReferenceError
    from validate.report import write_report

    checkpoint = None
    plan_hash = None
    if (out / "conversion.json").is_file():
        manifest = read_manifest(out)
        plan_hash, checkpoint = manifest.plan, manifest.checkpoint
    with _written_weights(out, source, plan, workers) as dequantized:
        try:
            report = run_parity(
                source=source,
                mlx_path=out,
                plan=plan_hash,
                dequantized=dequantized,
                kl_threshold=kl_threshold,
                progress=lambda text: console.say(f"  {text}"),
                trust_remote_code=trust_remote_code,
            )
        except ReferenceError as error:
            raise ConvertError(f"{source}: cannot be run as the reference: {error}") from error
    write_report(report, out)
    data: dict[str, Any] = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    data["checkpoint"] = checkpoint
    _rewrite(out / "parity.json", data)
    return data


def require_proof(out: Path) -> dict[str, Any]:
    """The passing report of exactly this output; raises GateError when there is none."""
    manifest = read_manifest(out)
    path = out / "parity.json"
    if not path.is_file():
        raise GateError(
            f"{out}: has no parity report, so it is not published; run "
            f"`convert validate --hf-path SRC --mlx-path {out}` first"
        )
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data.get("plan") != manifest.plan or data.get("checkpoint") != manifest.checkpoint:
        raise GateError(
            f"{path}: vouches for another plan or other files than {out} holds now; "
            f"run `convert validate --hf-path SRC --mlx-path {out}` again"
        )
    if data.get("verdict") != "pass":
        failed = [c["name"] for c in data.get("checks", ()) if c.get("verdict") == "fail"]
        raise GateError(
            f"{out}: the parity report says fail ({', '.join(failed) or 'no checks'}), so it is "
            f"not published; see {out / 'parity.html'}"
        )
    return data


@contextmanager
def _written_weights(
    out: Path, source: Path, plan: Plan | None, workers: int
) -> Iterator[Path | None]:
    """A torch checkpoint of the weights as written, where they are not those of the release."""
    if plan is not None and _lossless(plan):
        yield None
        return
    checkpoint = open_folder(out, allow_mlx=True)
    logical, specs = decoded(checkpoint, dtype="F32")
    arch = find_map(logical.config)
    if plan is None and not specs and not _arithmetic(arch, logical.config):
        yield None
        return
    release = open_folder(source)
    carried = {
        drop.name: release.tensors[drop.name]
        for drop in match_release(release, arch).drops
        if drop.same_as is None
    }
    merged = replace(logical, tensors={**logical.tensors, **carried})
    back = build_back_plan(
        merged,
        arch,
        Options(target="torch", dtype="float32"),
        torch_config=start(release.config),
        carried=carried,
    )
    with explain(out.parent):
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.reference-", dir=out.parent))
    try:
        with checkpoint.open() as mine, release.open() as theirs:
            reader = _Beside(DecodingReader(mine, logical, specs), theirs, set(carried))
            execute([Job(back, folder)], merged, reader=reader, stamp={}, workers=workers)
        _rewrite(folder / "config.json", back.config)
        _rewrite(folder / "model.safetensors.index.json", back.index())
        copy_sidecars(source, list_sidecars(source), folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lossless(plan: Plan) -> bool:
    return plan.options.quant is None and all(exact(out.expr) for out in plan.outputs)


def _arithmetic(arch: ArchMap, config: dict[str, Any]) -> bool:
    tensors = arch.expand(Facts(config), arch.layouts[0])
    return not all(exact(rule.expr) for rule in tensors.rules)


@dataclass(frozen=True, slots=True)
class _Beside:
    """Rows of the checkpoint, and of the release for the tensors that the checkpoint dropped."""

    checkpoint: RowReader
    release: RowReader
    dropped: set[str]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor."""
        reader = self.release if name in self.dropped else self.checkpoint
        return reader.read_rows(name, start, stop)


def _rewrite(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False, sort_keys=False) + "\n"
    path.write_text(text, encoding="utf-8")
