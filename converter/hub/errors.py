"""What went wrong at the hub, said in one paragraph that tells what to do and hides every token."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from converter.errors import HubError

_SECRETS = (
    (re.compile(r"\b(hf|api_org)_(?=\w{6})[A-Za-z0-9_]+"), r"\1_***"),
    (re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?)[^'\"\r\n,}]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+(?!\*)[A-Za-z0-9._~+/=-]+"), r"\1 ***"),
    (
        re.compile(
            r"(?i)\b((?:x-amz-[a-z-]*|access_|refresh_)?"
            r"(?:signature|sig|token|credential|key-pair-id|policy))=[^&\s'\"]+"
        ),
        r"\1=***",
    ),
    (re.compile(r"(?i)(://)[^/\s@]+@"), r"\1***@"),
)


def redact(text: str) -> str:
    """The text without access tokens, Authorization headers, signed-URL secrets and passwords."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


@contextmanager
def hub_errors(doing: str, *, repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn whatever the hub's client raises while `doing` something into a `HubError`."""
    import httpx2
    from huggingface_hub import errors

    client_errors = (
        OSError,
        ValueError,
        RuntimeError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        errors.EntryNotFoundError,
    )
    try:
        yield
    except HubError:
        raise
    except client_errors as error:
        raise HubError(redact(f"{doing}: {explain(error, repo_id, endpoint)}")) from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, None if the hub did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code
    return None


def asked_wait(error: BaseException) -> float:
    """Seconds that a busy hub asked to be left alone for; 0 where it said nothing."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            said = cause.response.headers.get("retry-after", "")
            return float(said) if said.isascii() and said.isdigit() else 0.0
    return 0.0


def may_have_been_done(error: BaseException) -> bool:
    """Whether a request that failed so may have succeeded at the hub, its answer lost."""
    import httpx2

    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 412)
    return any(isinstance(cause, httpx2.TransportError) for cause in causes(error))


def is_unreached(error: BaseException) -> bool:
    """Whether no hub was there to answer, as when the network or the name service is away."""
    import httpx2

    away = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)
    return any(isinstance(cause, away) for cause in causes(error))


def explain(error: BaseException, repo_id: str, endpoint: str) -> str:
    """What the error means and what to do about it, in one paragraph."""
    import httpx2
    from huggingface_hub import errors

    where = f"{endpoint}/{repo_id}"
    for cause in causes(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                "HF_HUB_OFFLINE is set, so nothing can be fetched. Unset it, "
                "or give a local folder instead of a repository name."
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return _explain_answer(cause, repo_id=repo_id, where=where)
        if isinstance(cause, errors.LocalTokenNotFoundError):
            return "No access token was found. Log in with `hf auth login`, or set HF_TOKEN."
        if isinstance(cause, errors.HFValidationError):
            return f"{repo_id!r} is not a repository name; it has the form <namespace>/<name>."
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return (
                "the disk that holds the cache is full. Free some space, or point HF_HOME "
                "at a larger disk; files that are complete are not fetched again."
            )
        if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
            return (
                "the connection broke before a file was complete. Run the same command "
                "again; files that are complete are not fetched again."
            )
        if isinstance(cause, httpx2.TransportError):
            return (
                f"{endpoint} cannot be reached ({type(cause).__name__}). Check the connection, "
                "a proxy, and HF_ENDPOINT if it is set, then run the same command again."
            )
    return _one_line(str(error)) or type(error).__name__


def _explain_answer(error: Exception, *, repo_id: str, where: str) -> str:
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    said = _one_line(error.server_message or "")
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        step = f", then {log_in}" if status == 401 else "; approval can take a while"
        return f"{repo_id} is gated. Ask for access at {where}{step}, and run this again."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision. Check --revision against {where}/commits/main."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the file is not in {repo_id} (HTTP {status}: {said}). See {where}/tree/main."
    if isinstance(error, errors.RepositoryNotFoundError):
        if status == 401:
            return (
                f"there is no repository {repo_id}, or it is private and you are not logged in "
                f"(HTTP 401). Check the name; if it is private, {log_in}."
            )
        return (
            f"there is no repository {repo_id}, or your token does not see it (HTTP {status}). "
            "Check the name, and that the token may read it."
        )
    if status == 401:
        return f"the hub did not accept the request's credentials (HTTP 401). To go on, {log_in}."
    if status == 403:
        return (
            f"your token may not do this to {repo_id} (HTTP 403: {said}). Use a token with write "
            f"access to the namespace {repo_id.split('/')[0]!r} ({log_in})."
        )
    if status == 429:
        wait = error.response.headers.get("retry-after")
        return (
            "too many requests for now (HTTP 429). Wait "
            f"{wait + ' seconds' if wait else 'five minutes'} and run the same command again; "
            "being logged in raises the limit."
        )
    if status >= 500:
        return (
            f"the hub is failing (HTTP {status}). Nothing is lost: run the same command again in "
            "some minutes, and it goes on where it stopped."
        )
    return f"the hub answered HTTP {status}{': ' + said if said else ''}."


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]
