"""What a request contradicts: itself, or the release that it is about."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.decode import View, quantization_settings
from converter.errors import ConvertError, PlanError, UsageError
from converter.execute.folder import MANIFEST, check_output, explain, work_folder
from converter.manifest import read_manifest
from converter.maps import MapChoice
from converter.memory import installed_memory
from converter.plan import Options, Plan
from converter.plan.memory import calibration_bytes
from converter.release import Release
from converter.ui import size_text
from quant.recipe import CALIBRATED

if TYPE_CHECKING:
    from converter.request import Request


def require_streamable(request: Request, release: Release) -> None:
    """UsageError where the weights must lie on this machine all the same."""
    if release.snapshot is None or release.unchecked:
        raise UsageError(f"--stream: {request.hf_path} is a folder, and nothing is fetched")
    if release.root is not None or release.source.kind != "safetensors":
        raise UsageError(
            "--stream: pickles and GGUF files are read from whole files; leave --stream out"
        )
    if request.part is not None:
        raise UsageError("--stream: --shard downloads what its shards read; leave one of them out")
    calibrated = any(recipe.calibration is not None for recipe in request.recipes)
    needs = [
        ("--q-target-bpw and --q-target-size", any(r.targeted for r in request.recipes)),
        ("--q-method imatrix, gptq and autoround", calibrated),
        ("--adapter-path", request.adapter_path is not None),
    ]
    for flag, asked in needs:
        if asked:
            raise UsageError(f"--stream: {flag} read the weights more than once; leave it out")


def require_separable(request: Request) -> None:
    """Refuse to make in parts what needs the whole: UsageError."""
    needs = [
        flag
        for flag, asked in (
            ("--q-method imatrix, gptq or autoround", any(r.calibration for r in request.recipes)),
            ("--q-target-bpw", any(r.targeted for r in request.recipes)),
            ("--mtp", request.mtp),
        )
        if asked
    ]
    if needs:
        raise UsageError(f"--shard: {needs[0]} looks at the whole release; leave one of them out")


def require_memory(plans: Sequence[Plan]) -> None:
    """Refuse to calibrate what this machine cannot hold: PlanError."""
    here = installed_memory()
    for plan in plans:
        if (needed := calibration_bytes(plan)) > here:
            asked, instead = _calibrating(plan.options)
            raise PlanError(
                [
                    f"{asked}: calibrating {plan.model_type} block by block takes about "
                    f"{size_text(needed)} of memory, and this machine has {size_text(here)}; use "
                    f"a larger one, or {instead}"
                ]
            )


def require_place(request: Request, out: Path, release: Release) -> None:
    """UsageError where an output would destroy something that is not to be replaced."""
    with explain(out):
        replaced = request.overwrite or request.replace_others
        check_output(out, source=release.root, overwrite=replaced)


def require_space(todo: Sequence[tuple[Plan, Path]]) -> None:
    """Refuse before writing what the disk has no room for, counting what is there already."""
    needed: dict[Path, int] = {}
    for plan, out in todo:
        work = work_folder(out, plan.hash)
        have = sum(file.stat().st_blocks * 512 for file in work.glob("*.safetensors"))
        parent = out.parent.resolve()
        needed[parent] = needed.get(parent, 0) + max(0, plan.output_bytes - have)
    for parent, size in needed.items():
        free = shutil.disk_usage(parent).free
        if size > free:
            raise ConvertError(
                f"{parent}: the disk has {size_text(free)} free and the output needs "
                f"{size_text(size)}; free some space or choose another --mlx-path"
            )


def _calibrating(options: Options) -> tuple[str, str]:
    """The flag that makes a recipe calibrate, and what to say instead of it."""
    method = options.quant.method if options.quant else ""
    search = "--q-method search, which needs no calibration"
    if not options.targeted:
        return f"--q-method {method}", search
    leave = "leave --calibration-data out"
    return options.target_text, f"{search}, and {leave}" if method in CALIBRATED else leave


def require_plain(request: Request, view: View) -> None:
    """Refuse what reads the weights of a torch release beside the conversion."""
    asked = ["--adapter-path"] if request.adapter_path is not None else []
    asked += (
        ["--q-target-bpw or --q-target-size"] if any(r.targeted for r in request.recipes) else []
    )
    if view.settings is not None and asked:
        raise UsageError(
            f"{asked[0]}: the release is quantized ({view.method}); this needs the unquantized one"
        )


def require_quantized(release: Release, *, torch: bool) -> None:
    """Refuse -d and --to torch for a torch release that they would do nothing to."""
    if torch or quantization_settings(release.source.config) is None:
        raise PlanError(
            [
                f"{release.name}: is a torch release already; --to torch starts from an MLX "
                "checkpoint, -d from one or from a quantized release"
            ]
        )


def require_written_map(release: Release, maps: MapChoice) -> None:
    """The way back needs the map of the way there, which a runtime's loader cannot say again."""
    told: dict[str, Any] = {}
    if release.root is not None and (release.root / MANIFEST).is_file():
        told = read_manifest(release.root).data.get("map") or {}
    if told.get("by") == "runtime" or maps.runtime:
        raise PlanError(
            [
                f"{release.name}: was made by a runtime's loader (--map runtime), which has no way "
                "back; convert from the torch release instead"
            ]
        )
