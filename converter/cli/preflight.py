"""What publishing would be refused for, found before anything is converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converter.errors import UsageError
from converter.naming import DRAFTER, output_name, require_repo_name
from converter.pipeline import Planned, Request, plan_request
from converter.publish import check_template, require_allowed, require_other
from converter.ui import Console


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was learned: the plan, where it can be gone on with, and who publishes."""

    planned: Planned | None = None
    account: str | None = None


def preflight(request: Request, given: dict[str, Any], console: Console) -> Preflight:
    """Check card and upload as ``given`` asks for them, from headers and the hub's answers.

    Raises UsageError, GateError or HubError for what would be refused once all is proven.
    """
    if given["card_template"] is not None:
        check_template(given["card_template"])
    if given["upload_repo"] is None:
        return Preflight()
    from converter.hub import require_private, writer

    named: str = given["upload_repo"]
    if named:
        require_repo_name(named, "--upload-repo")
    account = writer(named=bool(named))
    planned = plan_request(request, console, measure=False)
    _require_provable(planned, request)
    origin = planned.release.origin
    require_allowed(origin, private=given["private"], allow_gated=given["allow_gated"])
    if named and len(planned.plans) + len(planned.drafters) > 1:
        raise UsageError(
            "--upload-repo REPO names one repo; with --variants or --mtp leave REPO out"
        )
    for repo in [named] if named else _derived(planned, account):
        require_other(repo, origin.get("repo"))
        if given["private"] and (named or account is not None):
            require_private(repo)
    targeted = any(recipe.targeted for recipe in request.recipes)
    return Preflight(planned=None if targeted else planned, account=account)


def _derived(planned: Planned, account: str | None) -> list[str]:
    """The repos of all outputs; with a stand-in for an account that is not known yet."""
    names = []
    for plan in planned.plans:
        dtype = str(plan.config.get("dtype"))
        name = output_name(planned.release.name, plan.options, dtype=dtype, kept=plan.kept)
        names += [name, *([name + DRAFTER] if planned.drafters else [])]
    repos = [f"{account or 'account'}/{name}" for name in names]
    for repo in repos:
        require_repo_name(repo, "--upload-repo without a value")
    return repos


def _require_provable(planned: Planned, request: Request) -> None:
    back = request.dequantize or any(recipe.target == "torch" for recipe in request.recipes)
    if back and any(plan.decoding is None for plan in planned.plans):
        raise UsageError(
            "--upload-repo: what -d or --to torch makes of an MLX checkpoint is not proven, and so "
            "not published; `hf upload` sends it"
        )
