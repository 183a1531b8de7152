"""What is shown of an output whose release never lay on this disk.

The reference would need every weight of the release, which is what ``--stream`` avoids. So nothing
is compared, the verdict is *unproven*, and the report says how to get a proof. What is shown: every
source file had the hash that the hub states, a twin of the same config computes in the runtime what
torch computes, and the output loads as written and agrees with itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arch_maps.registry import ArchMap
from converter.diagnose import diagnose
from converter.manifest import read_manifest
from converter.proof import publish_report
from converter.release import Release
from converter.scratch import scratch
from converter.twin_proof import judge_twin
from converter.ui import Console
from validate.checks import Check

UNREAD: Final = (
    "the weights were streamed (--stream) and are not on this disk; `convert validate --hf-path "
    "{repo} --mlx-path {out}` downloads them and compares"
)


def prove_streamed(
    out: Path,
    release: Release,
    *,
    console: Console,
    arch: ArchMap,
    workers: int,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Judge a streamed output as far as it can be without its reference; parity.json's content."""
    from validate.parity import run_parity

    assert release.snapshot is not None
    source = release.local()
    manifest = read_manifest(out)
    report = run_parity(
        source=source,
        mlx_path=out,
        plan=manifest.plan,
        unread=UNREAD.format(repo=release.snapshot.repo_id, out=out.name),
        progress=lambda text: console.say(f"  {text}"),
        trust_remote_code=trust_remote_code,
        arch=arch,
    )
    console.say("  twin: converted and compared with torch")
    rows = (*diagnose(out, source, arch=arch), *report.checks)
    rows += (_files(release), _twin(release, beside=out, workers=workers))
    return publish_report(replace(report, checks=rows), out, manifest.checkpoint)


def _files(release: Release) -> Check:
    count = len(release.source.weight_files)
    return Check(
        name="source files",
        modality="files",
        verdict="pass",
        note=f"every file read, of {count}, had the hash that the hub states, or nothing would "
        "have been finished",
    )


def _twin(release: Release, *, beside: Path, workers: int) -> Check:
    with scratch("twin", beside) as place:
        verdict, why = judge_twin(release.source.config, place / "twin", workers=workers)
    return Check(
        name="twin",
        modality="weights",
        verdict="pass" if verdict == "pass" else "fail" if verdict == "fail" else "info",
        note="a tiny checkpoint of the same config, converted by the same map and compared with "
        f"torch: {verdict}{f' ({why})' if why else ''}",
    )
