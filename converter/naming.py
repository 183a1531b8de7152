"""Names of outputs and of the repos they are published in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from converter.errors import UsageError
from converter.plan.options import Options

DRAFTER: Final = "-mtp"
"""What the name of a drafter ends in, after that of the output that it drafts for."""


def output_name(model: str, options: Options, *, dtype: str | None, kept: str = "") -> str:
    """``<model>-<what it is>``, such as ``Qwen3-0.6B-4bit`` or ``Qwen3-0.6B-bf16``.

    ``kept`` says what the release's own quantization became, where it was kept.
    """
    if options.target == "torch":
        return f"{model}-torch"
    if kept:
        return f"{model}-{kept}"
    if options.quant is None and options.dtype is None:
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        return f"{model}-{short.get(dtype or '', 'mlx')}"
    return f"{model}-{options.suffix}"


def published_as(target: str, *, mtp: bool) -> tuple[str, ...]:
    """The repos of an output that is published as ``target``: its own, and a drafter's beside."""
    return (target, target + DRAFTER) if mtp else (target,)


def repo_name(requested: str, name: str, *, account: str | None = None) -> str:
    """The repo to upload to; an empty request derives it from the account and the output's name.

    Raises HubError when the account is needed, not known, and no token is there.
    """
    if requested:
        return requested
    from converter.hub import whoami

    return f"{account or whoami()}/{name}"


def require_repo_name(repo_id: str, asked: str) -> None:
    """UsageError, telling what ``asked`` for it, where the hub takes no repo of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if "/" in repo_id:
            return
        problem = "has no namespace"
    except HFValidationError:
        problem = "is no name that the hub takes"
    raise UsageError(
        f"{asked}: {repo_id} {problem}; give <namespace>/<name>, at most 96 letters, digits, '-', "
        "'_' and '.'"
    )


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as much of the path as tells them apart; UsageError for one twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) != len(paths):
        raise UsageError("the same output is given twice")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different parts")
