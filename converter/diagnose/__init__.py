"""What is wrong with an MLX checkpoint, whoever made it, told from its files before it is run.

The runtimes load many a damaged checkpoint without a word, or end with an error that names a
symptom. Each fault here is one that conversions on the hub were published with.
"""

from __future__ import annotations

from pathlib import Path

from arch_maps.registry import ArchMap, find, map_name
from converter.diagnose.files import index_problems, sidecar_problems
from converter.diagnose.quantized import quantization_problems
from converter.diagnose.tensors import layout_problems, lost_drafter, number_problems
from converter.errors import PlanError
from converter.source import Source, folder_of, open_folder
from converter.source.folder import read_json
from validate.checks import Check
from validate.loaded import CheckpointError, written_tensors

_SHOWN = 6


def diagnose(out: Path, source: Path, *, arch: ArchMap | None = None) -> list[Check]:
    """A failed row for each kind of fault of ``out``, and ``info`` rows of what it leaves out.

    Reads headers, small files, and the values of a few tensors that a shape cannot judge. Empty for
    a sound checkpoint. Raises PlanError when config.json itself cannot be read.
    """
    config = read_json(out, "config.json")
    kinds = {
        "index": index_problems(out),
        "tokenizer and processor": sidecar_problems(out, folder_of(source)),
    }
    lost = None
    try:
        tensors = written_tensors(out)
    except CheckpointError as error:
        kinds["weight files"] = [str(error)]
    else:
        release = _release(source)
        kinds["quantization"] = quantization_problems(tensors, config)
        kinds["numbers"] = number_problems(tensors, release)
        if release is not None and not kinds["numbers"]:
            arch = arch or find(str(map_name(release.config)))
            kinds["layout"] = layout_problems(tensors, release, arch) if arch else []
        made_here = (out / "conversion.json").is_file()
        lost = lost_drafter(tensors, release, made_here=made_here) if release else None
    rows = [_row(name, problems) for name, problems in kinds.items() if problems]
    return [*rows, *([_row("drafter", [lost], verdict="info")] if lost else [])]


def _release(source: Path) -> Source | None:
    try:
        return open_folder(source)
    except PlanError:
        return None  # judging the release is another matter, with errors of its own


def _row(name: str, problems: list[str], *, verdict: str = "fail") -> Check:
    more = f"; and {len(problems) - _SHOWN} more like these" if len(problems) > _SHOWN else ""
    return Check(
        name=name,
        modality="files",
        value=float(len(problems)),
        threshold=0.0 if verdict == "fail" else None,
        verdict="fail" if verdict == "fail" else "info",
        note="; ".join(problems[:_SHOWN]) + more,
    )
