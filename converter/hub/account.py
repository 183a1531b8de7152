"""Which account is logged in, and whether it may publish: asked before anything is uploaded."""

import json
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from converter.errors import HubError
from converter.hub.api import TIMEOUT_S, client, patiently
from converter.hub.errors import hub_errors, may_have_been_done, status_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")


def whoami(*, endpoint: str | None = None, token: str | None = None) -> str:
    """The name of the account that the token belongs to; HubError where that is not told."""
    api = client(endpoint=endpoint, token=token)
    doing = "Asking the hub who you are"
    with hub_errors(doing, repo_id="", endpoint=api.endpoint):
        name, _ = _account(api)
    if name is None:
        raise _unnamed(doing, api.endpoint)
    return name


def writer(*, named: bool, endpoint: str | None = None, token: str | None = None) -> str | None:
    """The name of the account that is to publish; HubError for one that certainly may not.

    None where it cannot be told now: the hub is away or busy, which may have passed by the time of
    the upload, or nobody needs it for a repo that is ``named``: a mirror may not know of accounts,
    and on a staging hub nobody need be logged in.
    """
    from huggingface_hub import get_token

    api = client(endpoint=endpoint, token=token)
    if named and is_loopback(api.endpoint) and (token or get_token()) is None:
        return None
    doing = "Asking the hub who is to publish"
    with hub_errors(doing, repo_id="", endpoint=api.endpoint):
        found = _now(lambda: _account(api))
    if found is None:
        return None
    name, role = found
    if role == "read":
        raise HubError(
            f"{doing}: the token{f' of {name}' if name else ''} may only read. Make one that may "
            f"write at {api.endpoint}/settings/tokens, and log in with `hf auth login` or set "
            "HF_TOKEN."
        )
    if name is None and not named:
        raise _unnamed(doing, api.endpoint)
    return name


def _account(api: "HfApi") -> tuple[str | None, str | None]:
    """Name of the account and role of its token, each None where the hub does not tell.

    Mirrors may answer what they like; only an answer that the token is not accepted is believed.
    """
    try:
        found = api.whoami()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None, None
    except Exception as error:
        status = status_of(error)
        if status is None or status in (401, 429) or may_have_been_done(error):
            raise
        return None, None
    name = _within(found, "name")
    role = _within(found, "auth", "accessToken", "role")
    return str(name) if name else None, str(role) if role else None


def _within(answer: Any, *keys: str) -> Any:
    """What lies under nested keys, None where one is not there."""
    for key in keys:
        answer = answer.get(key) if isinstance(answer, dict) else None
    return answer


def _unnamed(doing: str, endpoint: str) -> HubError:
    return HubError(
        f"{doing}: {endpoint} does not tell which account the token belongs to. Name the repo: "
        "--upload-repo <namespace>/<name>."
    )


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
