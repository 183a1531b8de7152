"""The last steps of a conversion: each output is proven, and what passed is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click

from converter.cli.errors import say
from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.execute.folder import explain
from converter.memory import size_of
from converter.naming import DRAFTER
from converter.pipeline import Converted
from converter.ui import Console, verdict_text

_GRAVEST: Final = (GateError, HubError, PlanError, UsageError)
"""After whatever is none of these; a nightly run ranks failures in the same order."""


def prove_and_publish(
    outputs: list[Converted], given: dict[str, Any], console: Console, workers: int
) -> None:
    """Prove every output, then publish those that passed; what failed is raised at the end.

    ``given`` holds the command line, and the ``account`` that publishes where that is known.
    What an earlier run has proven is taken as it is, and not uploaded again where it is published;
    UsageError where all of it is and nothing is asked of how.
    """
    # An upload sends what the repo has not, such as another card, and looks at its visibility.
    there = {} if asks_how(given) else _published_before(outputs, given)
    proven: list[tuple[Converted, dict[str, Any]]] = []
    failed: list[tuple[Path, Exception]] = []
    try:
        _prove_all(outputs, given, console, workers, proven, failed)
        _publish_all(proven, there, given, console, failed)
    except BaseException:  # interrupted: what has failed until then is said all the same
        for out, error in failed:
            say(_named(out, error))
        raise
    if failed:
        raise _gravest(failed, alone=len(outputs) == 1)


def asks_how(given: Mapping[str, Any]) -> bool:
    """Whether flags are about the card or the repo, which what is published may not be like."""
    return given.get("card_template") is not None or bool(given.get("private"))


def _prove_all(
    outputs: Sequence[Converted],
    given: dict[str, Any],
    console: Console,
    workers: int,
    proven: list[tuple[Converted, dict[str, Any]]],
    failed: list[tuple[Path, Exception]],
) -> None:
    for output in outputs:
        console.say(f"validate: {output.folder}")
        try:
            proven.append((output, _proof(output, given, console, workers)))
        except Exception as error:  # a fault in one is no reason to lose the others
            failed.append((output.folder, error))


def _publish_all(
    proven: Sequence[tuple[Converted, dict[str, Any]]],
    there: Mapping[Path, str],
    given: dict[str, Any],
    console: Console,
    failed: list[tuple[Path, Exception]],
) -> None:
    try:
        _set_side_by_side([output.folder for output, _ in proven if output.target is None])
    except Exception as error:  # a table on a page is worth less than what was proven
        failed.append((proven[0][0].folder, error))
    for output, report in proven:
        try:
            _publish(output, report, given, console, there.get(output.folder))
        except Exception as error:
            failed.append((output.folder, error))


def _published_before(outputs: Sequence[Converted], given: dict[str, Any]) -> dict[Path, str]:
    """Addresses of outputs that an earlier run has published; UsageError where these are all."""
    from converter.batch.published import find_published
    from converter.manifest import read_manifest
    from converter.proof import own_report

    there: dict[Path, str] = {}
    for output in outputs:
        repo = _repo(output, given) if output.reused and own_report(output.folder) else None
        if repo is not None:
            with explain(output.folder.parent), TemporaryDirectory() as folder:
                try:
                    found = find_published(repo, output.plan.hash, Path(folder) / "remote")
                except HubError:  # uploading says what is wrong with the hub
                    continue
            # A plan says nothing of the weights of a folder, nor of KV settings.
            own = read_manifest(output.folder).checkpoint
            if found is not None and found.facts["checkpoint"] == own:
                there[output.folder] = found.url
    if len(there) == len(outputs):
        told = "\n".join(f"{out}: is published already, at {url}" for out, url in there.items())
        raise UsageError(f"{told}\nUse --overwrite to make it again")
    return there


def _proof(
    output: Converted, given: dict[str, Any], console: Console, workers: int
) -> dict[str, Any]:
    """The report of one output."""
    from converter.proof import prove, prove_drafter, standing_report
    from converter.streamed import prove_streamed

    out = output.folder
    target = output.target or given["draft_for"]
    if output.reused and target is None:
        report = standing_report(out, kl_threshold=given["kl_threshold"])
        if report is not None:
            console.say("  has been proven already")
            return report
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


def _repo(output: Converted, given: dict[str, Any]) -> str | None:
    """Where an output is to be published, None where it is not."""
    from converter.naming import output_name, repo_name

    plan, requested = output.plan, given["upload_repo"]
    if requested is None:
        return None
    dtype = str(plan.config.get("dtype"))
    derived = output_name(output.release.name, plan.options, dtype=dtype, kept=plan.kept)
    derived += DRAFTER if output.target is not None else ""
    return repo_name(requested, derived, account=given["account"])


def _publish(
    output: Converted,
    report: dict[str, Any],
    given: dict[str, Any],
    console: Console,
    there: str | None,
) -> None:
    """Card and verdict of one output, and its upload where that was asked and it is not ``there``.

    Raises GateError for one that did not pass.
    """
    from converter.proof import require_proof
    from converter.publish import upload_output, write_card

    out, repo = output.folder, _repo(output, given)
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
        address = there or upload_output(
            out,
            repo,
            console=console,
            private=given["private"],
            allow_gated=given["allow_gated"],
            allow_unproven=given["allow_unproven"],
        )
        click.echo(f"published: {address}")


def _gravest(failed: Sequence[tuple[Path, Exception]], *, alone: bool) -> Exception:
    """All failures as one, each naming its output, of the class of the gravest."""
    if alone and len(failed) == 1:
        return failed[0][1]
    kinds = {next((k for k in _GRAVEST if isinstance(e, k)), ConvertError) for _, e in failed}
    kind = next((kind for kind in (ConvertError, *_GRAVEST) if kind in kinds), ConvertError)
    lines = "\n".join(_named(out, error) for out, error in failed)
    return PlanError(lines.splitlines()) if kind is PlanError else kind(lines)


def _named(out: Path, error: Exception) -> str:
    """What went wrong with an output, in words that name it."""
    text = str(error)
    if not isinstance(error, ConvertError):
        text = f"internal error: {type(error).__name__}: {error}"
    return text if str(out) in text else f"{out}: {text}"


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
