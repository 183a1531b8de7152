"""Whether the account that is logged in may publish, asked before there is anything to upload."""

from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from converter.errors import HubError
from converter.hub.api import TIMEOUT_S, client, patiently
from converter.hub.errors import hub_errors, may_have_been_done, status_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")


def writer(*, named: bool, endpoint: str | None = None, token: str | None = None) -> str | None:
    """The name of the account that is to publish; HubError for one that certainly may not.

    None where it cannot be told now: the hub is away or busy, which may have passed by the time of
    the upload, or it is a staging hub, where nobody need be logged in for a repo that is ``named``.
    """
    from huggingface_hub import get_token

    api = client(endpoint=endpoint, token=token)
    if named and is_loopback(api.endpoint) and (token or get_token()) is None:
        return None
    doing = "Asking the hub who is to publish"
    with hub_errors(doing, repo_id="", endpoint=api.endpoint):
        who = _now(api.whoami)
    if who is None:
        return None
    access = who.get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(
            f"{doing}: the token of {who['name']} may only read. Make one that may write at "
            f"{api.endpoint}/settings/tokens, and log in with `hf auth login` or set HF_TOKEN."
        )
    return str(who["name"])


def require_private(repo_id: str, *, endpoint: str | None = None, token: str | None = None) -> None:
    """HubError where a repo that is to be private exists and is public."""
    api = client(endpoint=endpoint, token=token)
    with hub_errors(f"Looking up {repo_id}", repo_id=repo_id, endpoint=api.endpoint):
        if _now(lambda: api.repo_exists(repo_id)):
            refuse_public(api, repo_id)


def refuse_public(api: "HfApi", repo_id: str) -> None:
    """HubError for a public repo; whatever the client raises where the hub does not answer."""
    if not patiently(lambda: api.model_info(repo_id, timeout=TIMEOUT_S)).private:
        raise HubError(
            f"{repo_id} exists and is public, but --private was asked for: nothing was uploaded. "
            f"Make it private at {api.endpoint}/{repo_id}/settings, or choose another name."
        )


def is_loopback(endpoint: str) -> bool:
    """Whether an address is of this machine, as a staging hub's is."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _now(ask: Callable[[], Result]) -> Result | None:
    """The hub's answer, None where it is away or busy."""
    try:
        return ask()
    except Exception as error:
        if may_have_been_done(error) or status_of(error) == 429:
            return None
        raise
