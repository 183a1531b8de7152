"""A staging hub: a small server on loopback that speaks the Hugging Face hub's protocol.

It lets the whole job run without an account, lets people look at what they are about to publish,
and lets every test that touches the hub use the real client over HTTP. Nothing here imports a web
framework until a server is actually made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.staging.faults import Fault, Faults, Weather

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Fault", "Faults", "StagingOptions", "Weather", "create_app", "running_hub", "serve"]


@dataclass(frozen=True)
class StagingOptions:
    """How a staging hub treats its visitors: who they are, and which tokens it believes."""

    user: str = "local"
    tokens: frozenset[str] | None = None
    """Accepted tokens; None accepts any token, as suits one person's own machine."""
    require_token: bool = False
    """True refuses writes without a token, as the public hub does."""
    page_size: int = 1000
    """Most entries per page of a listing; the rest follows by `Link` headers."""


def create_app(
    dir: Path, *, options: StagingOptions | None = None, faults: Faults | None = None
) -> "FastAPI":
    """The server as an ASGI application that keeps everything below `dir`."""
    from converter.staging.app import build_app

    return build_app(Path(dir), options=options or StagingOptions(), faults=faults)


def serve(
    dir: Path, host: str = "127.0.0.1", port: int = 8008, *, options: StagingOptions | None = None
) -> None:
    """Serve `dir` until interrupted; `UsageError` unless `host` is a loopback address."""
    from converter.staging.server import serve_app

    serve_app(create_app(dir, options=options), host=host, port=port)


@contextmanager
def running_hub(
    dir: Path,
    *,
    port: int = 0,
    options: StagingOptions | None = None,
    faults: Faults | None = None,
) -> Iterator[str]:
    """Serve `dir` from a daemon thread (on a free port unless given) and yield the endpoint URL."""
    from converter.staging.server import background_server

    with background_server(create_app(dir, options=options, faults=faults), port=port) as endpoint:
        yield endpoint
