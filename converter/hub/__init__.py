"""The Hugging Face hub as source and destination, through the real client and never on trust."""

from converter.hub.account import require_private, whoami, writer
from converter.hub.api import Progress, client
from converter.hub.cached import (
    cached_folder,
    cached_names,
    cached_repo,
    cached_snapshot,
    check_cached,
    is_offline,
)
from converter.hub.errors import hub_errors, redact
from converter.hub.fetch import download, git_blob_id_of, sha256_of
from converter.hub.publish import STALE_PATTERNS, upload
from converter.hub.snapshot import HubFile, HubSnapshot, fetch_range, resolve_revision
from converter.hub.stream import StreamReader, open_stream

__all__ = [
    "STALE_PATTERNS",
    "HubFile",
    "HubSnapshot",
    "Progress",
    "StreamReader",
    "cached_folder",
    "cached_names",
    "cached_repo",
    "cached_snapshot",
    "check_cached",
    "client",
    "download",
    "fetch_range",
    "git_blob_id_of",
    "hub_errors",
    "is_offline",
    "open_stream",
    "redact",
    "require_private",
    "resolve_revision",
    "sha256_of",
    "upload",
    "whoami",
    "writer",
]
