"""The last steps of a conversion: each output is proven, and what passed is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.memory import size_of
from converter.mtp import SUFFIX
from converter.pipeline import Converted
from converter.ui import Console, verdict_text

_KINDS: Final = (UsageError, PlanError, GateError, HubError, ConvertError)
"""One for each exit status."""


def prove_and_publish(
    outputs: list[Converted], given: dict[str, Any], console: Console, workers: int
) -> None:
    """Prove every output, then publish those that passed; what failed is raised at the end."""
    if given["upload_repo"] and len(outputs) > 1:
        raise UsageError(
            "--upload-repo REPO names one repo; with --variants or --mtp leave REPO out"
        )
    proven: list[tuple[Converted, dict[str, Any]]] = []
    failed: list[tuple[Path, ConvertError]] = []
    for output in outputs:
        console.say(f"validate: {output.folder}")
        try:
            proven.append((output, _proof(output, given, console, workers)))
        except ConvertError as error:
            failed.append((output.folder, error))
    _set_side_by_side([output.folder for output, _ in proven if output.target is None])
    for output, report in proven:
        try:
            _publish(output, report, given, console)
        except ConvertError as error:
            failed.append((output.folder, error))
    if failed:
        raise _gravest(failed, alone=len(outputs) == 1)


def _proof(
    output: Converted, given: dict[str, Any], console: Console, workers: int
) -> dict[str, Any]:
    """The report of one output."""
    from converter.proof import prove, prove_drafter
    from converter.streamed import prove_streamed

    out = output.folder
    target = output.target or given["draft_for"]
    if target is not None:
        return prove_drafter(out, target=target, console=console)
    if output.release.streamed:
        return prove_streamed(
            out,
            output.release,
            console=console,
            arch=output.arch,
            workers=workers,
            trust_remote_code=given["trust_remote_code"],
        )
    with output.reference(workers=workers) as reference:
        return prove(
            out,
            source=reference,
            console=console,
            plan=output.plan,
            kl_threshold=given["kl_threshold"],
            trust_remote_code=given["trust_remote_code"],
            workers=workers,
            arch=output.arch,
            memory_limit=memory_limit(given),
        )


def _publish(
    output: Converted, report: dict[str, Any], given: dict[str, Any], console: Console
) -> None:
    """Card and verdict of one output, and its upload where that was asked.

    Raises GateError for one that did not pass.
    """
    from converter.naming import output_name, repo_name
    from converter.proof import require_proof
    from converter.publish import upload_output, write_card

    out, plan, requested = output.folder, output.plan, given["upload_repo"]
    repo = None
    if requested is not None:
        dtype = str(plan.config.get("dtype"))
        derived = output_name(output.release.name, plan.options, dtype=dtype, kept=plan.kept)
        derived += SUFFIX if output.target is not None else ""
        repo = repo_name(requested, derived)
    write_card(
        out,
        repo_id=repo,
        source_card=output.release.card(),
        template=given["card_template"],
    )
    click.echo(verdict_text(report, out))
    require_pass(report, out)
    if repo is not None:
        require_proof(out, allow_unproven=given["allow_unproven"])
        address = upload_output(
            out,
            repo,
            console=console,
            private=given["private"],
            allow_gated=given["allow_gated"],
            allow_unproven=given["allow_unproven"],
        )
        click.echo(f"published: {address}")


def _gravest(failed: Sequence[tuple[Path, ConvertError]], *, alone: bool) -> ConvertError:
    """All failures as one, each naming its output, of the class of the first that is no gate."""
    if alone:
        return failed[0][1]
    first = next((error for _, error in failed if not isinstance(error, GateError)), failed[0][1])
    kind = next(kind for kind in _KINDS if isinstance(first, kind))
    texts = [str(error) if str(out) in str(error) else f"{out}: {error}" for out, error in failed]
    lines = "\n".join(texts)
    return PlanError(lines.splitlines()) if kind is PlanError else kind(lines)


def _set_side_by_side(outputs: list[Path]) -> None:
    """Show on the page of each output of a run what the others cost."""
    from converter.measured import record_variants
    from converter.page import draw_page

    if len(outputs) > 1:
        record_variants(outputs)
        for out in outputs:
            draw_page(out)


def memory_limit(given: dict[str, Any]) -> int | None:
    """Bytes that --memory-limit states; UsageError where it is no size."""
    text = given["memory_limit"]
    return None if text is None else size_of(text, "--memory-limit")


def require_pass(report: dict[str, Any], out: Path) -> None:
    """GateError, naming the failed checks, unless the report lets the output pass."""
    if report["verdict"] not in ("pass", "unproven"):
        failed = [check["name"] for check in report["checks"] if check["verdict"] == "fail"]
        raise GateError(
            f"{out}: parity failed ({', '.join(failed)}); it is kept for inspection and is not "
            f"published. See {out / 'parity.html'}"
        )
