"""Which names are acceptable: repositories, branches, and paths inside a repository."""

import re

from converter.staging.refusal import Refusal

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,243}")
# First path segments that mean something else on the hub.
_RESERVED_OWNERS = frozenset({"api", "datasets", "spaces", "kernels", "buckets", "models"})
MAX_PATH = 1024


def checked_repo_id(owner: str, name: str) -> str:
    """`owner/name`, or a `Refusal` if either part could not be a repository's on the public hub."""
    for part in (owner, name):
        acceptable = _PART.fullmatch(part) and part[-1] not in ".-" and not part.endswith(".git")
        if not acceptable or ".." in part or "--" in part:
            raise Refusal(400, f"Invalid repository name: {part!r}")
    if owner.lower() in _RESERVED_OWNERS:
        raise Refusal(400, f"Reserved namespace: {owner!r}")
    return f"{owner}/{name}"


def checked_branch(name: str) -> str:
    """The branch name, or a `Refusal`."""
    branch = name.removeprefix("refs/heads/")
    if not _BRANCH.fullmatch(branch) or ".." in branch or "//" in branch or branch[-1] in "./":
        raise Refusal(400, f"Invalid branch name: {name!r}")
    return branch


def checked_path(path: str) -> str:
    """The path of a file inside a repository, or a `Refusal` if it could leave the repository."""
    parts = path.split("/")
    escapes = any(part in ("", ".", "..") for part in parts) or "\\" in path
    if escapes or not path.isprintable() or len(path) > MAX_PATH or re.match(r"[A-Za-z]:", path):
        raise Refusal(400, f"Invalid path in repository: {path!r}")
    if any(part.lower() == ".git" for part in parts):
        raise Refusal(400, f"Cannot update files under a .git folder: {path!r}")
    return path
