"""``convert compare``: outputs of one release side by side, and plain rounding of their sizes."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converter.adapter.output import reference_of_output
from converter.decode import decoded
from converter.errors import ConvertError, UsageError
from converter.execute.folder import MANIFEST
from converter.manifest import read_manifest
from converter.naming import folder_names
from converter.pipeline import Request, convert, plan_request
from converter.plain import plain_release
from converter.plan import Options
from converter.plan.model import bits_per_weight
from converter.release import Release, fetch, open_release
from converter.source import open_folder
from converter.ui import Console
from converter.written import written_weights
from quant.recipe import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantSpec

_SLICE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: finished outputs, their release, and a text."""

    outputs: tuple[Path, ...]
    hf_path: str | None
    revision: str | None = None
    gguf: str | None = None
    text: Path | None = None
    length: int
    windows: int
    adapter_path: Path | None = None
    trust_remote_code: bool = False


def compare(given: Comparison, console: Console) -> dict[str, Any]:
    """The report: a row for each output and for each control, by size.

    Raises UsageError for folders that are not outputs of one release, ConvertError where the
    release cannot be run.
    """
    from validate.evaluation import Evaluation, default_text
    from validate.quality import statistics
    from validate.reference import ReferenceError

    release = _release(given)
    text = default_text() if given.text is None else _read(given.text)
    with (
        tempfile.TemporaryDirectory(prefix="compare-") as folder,
        reference_of_output(given.outputs[0], release, None, given.adapter_path) as released,
        plain_release(released, beside=Path(folder) / "release") as source,
    ):
        scratch = Path(folder)
        try:
            console.say(f"reference: {release.name}")
            evaluation = Evaluation(
                source,
                text,
                scratch,
                length=given.length,
                count=given.windows,
                trust_remote_code=given.trust_remote_code,
            )

            def row(out: Path, name: str, control: bool) -> dict[str, Any]:
                console.say(f"judge: {name}")
                with written_weights(out, source, place=scratch) as folder:
                    found = statistics(evaluation.tokens(folder))
                    tensors = _noise(source, folder)
                signal, noise = (
                    sum(t[key] for t in tensors.values()) for key in ("signal", "noise")
                )
                from validate.quality import sqnr

                size = _size(out)
                return {
                    "name": name,
                    "control": control,
                    "bytes": size,
                    "bits_per_weight": _bits(out),
                    **found,
                    "sqnr": sqnr(signal, noise) if noise else None,
                    "tensors": tensors,
                }

            rows = [
                row(out, name, False)
                for out, name in zip(given.outputs, folder_names(given.outputs), strict=True)
            ]
            found = [
                (own, *_control(out, own["bytes"], source))
                for out, own in zip(given.outputs, rows, strict=True)
            ]
            controls = {spec: own for own, spec, itself in found if itself}
            for own, spec, _ in found:
                if spec is None:
                    continue
                if spec not in controls:
                    name = f"RTN {spec.bits}-bit g{spec.group_size}"
                    console.say(f"control: {name}")
                    made = _convert(source, scratch / f"{spec.bits}-{spec.group_size}", spec)
                    controls[spec] = row(made, name, True)
                own["kl_of_control"] = _ratio(own["kl_mean"], controls[spec]["kl_mean"])
                own["control_name"] = controls[spec]["name"]
        except ReferenceError as error:
            raise ConvertError(f"{release.name}: cannot be compared: {error}") from error
    made_here = [one for one in controls.values() if one["control"]]
    rows = sorted([*rows, *made_here], key=lambda r: (r["bytes"], r["control"]))
    return {
        "release": release.name,
        "source": release.origin,
        "text": {
            "name": "the shipped text" if given.text is None else given.text.name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "length": len(evaluation.windows[0]),
            "windows": len(evaluation.windows),
        },
        "tokens": rows[0]["tokens"],
        "perplexity_base": rows[0]["perplexity_base"],
        "rows": rows,
    }


def record_comparison(outputs: Sequence[Path], report: Mapping[str, Any]) -> None:
    """Write what was measured beside each of ``outputs``, and draw their pages anew."""
    from converter.measured import record
    from converter.page import draw_page

    text = report["text"]
    what = (
        f"{report['tokens']} tokens of {text['name']}, in windows of {text['length']}, run in torch"
    )
    names = dict(zip(outputs, folder_names(outputs), strict=True))
    for out, quality in record(names, report["rows"], measured=what).items():
        draw_page(out, quality=quality)


def _release(given: Comparison) -> Release:
    """The release of all outputs, fetched; UsageError where they are not of one."""
    told: dict[Path, dict[str, Any]] = {}
    for out in given.outputs:
        if not (out / "config.json").is_file():
            raise UsageError(f"{out}: is no checkpoint; it has no config.json")
        if (out / MANIFEST).is_file():
            told[out] = read_manifest(out).data["source"]
    hf_path, revision = given.hf_path, given.revision
    if hf_path is None:
        known = next((s for s in told.values() if s.get("repo")), None)
        if known is None:
            raise UsageError("--hf-path: the manifests name no hub release; say what it is")
        hf_path, revision = str(known["repo"]), str(known["commit"])
    release = fetch(open_release(hf_path, revision=revision, gguf=given.gguf))
    files = {name: list(pair) for name, pair in release.source.fingerprint().items()}
    for out, source in told.items():
        if source["files"] != files:
            raise UsageError(f"{out}: was made from other files than {hf_path}")
    adapters = {str(source.get("adapter")) for source in told.values()}
    if len(adapters) > 1:
        raise UsageError("the outputs have different adapters fused in, and no common reference")
    return release


def _control(out: Path, size: int, source: Path) -> tuple[QuantSpec | None, bool]:
    """The plain rounding whose size is nearest to ``size``, and whether ``out`` is just that.

    None for an output that is not quantized.
    """
    config = open_folder(out, allow_mlx=True).config
    if not isinstance(config.get("quantization"), dict):
        return None, False
    specs = [
        QuantSpec("affine", bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES
    ]
    recipes = tuple(Options(quant=spec) for spec in specs)
    plans = plan_request(Request(hf_path=str(source), recipes=recipes)).plans
    nearest = min(plans, key=lambda plan: (abs(plan.output_bytes - size), plan.output_bytes))
    itself = False
    if (out / MANIFEST).is_file():
        itself = read_manifest(out).data["recipe"] == nearest.options.to_json()
    return nearest.options.quant, itself


def _convert(source: Path, out: Path, spec: QuantSpec) -> Path:
    request = Request(hf_path=str(source), mlx_path=out, recipes=(Options(quant=spec),))
    return convert(request, Console(quiet=True))[0].folder


def _noise(source: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Energy, squared error and SQNR of every tensor that differs from the release's."""
    from validate.quality import sqnr

    release, written = open_folder(source), open_folder(folder)
    found: dict[str, dict[str, float]] = {}
    with release.open() as theirs, written.open() as ours:
        for name, info in written.tensors.items():
            if name not in release.tensors or not info.shape or info.dtype[0] not in "FB":
                continue
            step = max(1, _SLICE // max(1, math.prod(info.shape[1:])))
            signal = noise = 0.0
            for start in range(0, info.shape[0], step):
                stop = min(info.shape[0], start + step)
                a = theirs.read_rows(name, start, stop).astype(np.float64)
                b = ours.read_rows(name, start, stop).astype(np.float64)
                signal += float(np.square(a).sum())
                noise += float(np.square(a - b).sum())
            if noise:
                ratio = sqnr(signal, noise)
                found[name] = {"sqnr": ratio, "signal": signal, "noise": noise}
    return found


def _size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def _bits(out: Path) -> float:
    """Stored bits per parameter of a checkpoint, packed ones counted as what they stand for."""
    stored = open_folder(out, allow_mlx=True)
    logical = decoded(stored).source
    return bits_per_weight(
        sum(info.nbytes for info in stored.tensors.values()),
        sum(math.prod(info.shape) for info in logical.tensors.values()),
    )


def _ratio(value: float, control: float) -> float | None:
    return value / control if control else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path}: cannot be read as UTF-8 text: {error}") from error
