"""Dask's distributed, as far as a fleet uses it: addresses, TLS, resources."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from converter.batch.needs import DISK, MEMORY
from converter.errors import UsageError

_TAG: Final = "tag:"
"""How the names of tags begin, so that one called ``memory`` is no amount of memory."""
_ANY: Final = 1_000_000.0
"""A tag is a resource of which a worker has more than tasks could ever use up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """Where a fleet's scheduler listens, and what it and the workers know each other by."""

    address: str
    ca_file: str | None = None
    cert: str | None = None
    key: str | None = None

    @classmethod
    def of(
        cls, address: str, *, ca_file: str | None, cert: str | None, key: str | None
    ) -> Scheduler:
        """From the command line; UsageError for an address or files that do not fit."""
        scheme, _, rest = address.partition("://")
        if scheme not in ("tcp", "tls") or ":" not in rest:
            raise UsageError(f"{address}: give a scheduler as tcp://HOST:PORT or tls://HOST:PORT")
        given = [ca_file, cert, key]
        if (scheme == "tls") != all(given) or (scheme == "tcp" and any(given)):
            raise UsageError(
                f"{address}: tls:// goes with --tls-ca-file, --tls-cert and --tls-key, and they "
                "with it"
            )
        return cls(address=address, ca_file=ca_file, cert=cert, key=key)

    def security(self) -> Any:
        """Dask's own object, None without TLS."""
        if self.ca_file is None:
            return None
        library = distributed()
        same = {
            f"tls_{role}_{what}": value
            for role in ("client", "worker")
            for what, value in (("cert", self.cert), ("key", self.key))
        }
        return library.Security(tls_ca_file=self.ca_file, require_encryption=True, **same)


def distributed() -> Any:
    """The library; UsageError where it is not installed."""
    try:
        import dask

        # A scheduler that goes away is no news to it: tracebacks for each attempt to connect.
        loud = ("distributed", "distributed.client", "tornado.application")
        dask.config.set({"logging": dict.fromkeys(loud, "critical")})
        import distributed as library
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed; pip install 'mlx-dayzero[fleet]'"
        ) from error
    return library


def offered(*, memory: int, disk: int, tags: Collection[str]) -> dict[str, float]:
    """A worker's resources: bytes of memory and disk, and its tags."""
    return {MEMORY: float(memory), DISK: float(disk), **{_TAG + tag: _ANY for tag in sorted(tags)}}


def asked(*, memory: int, disk: int, tag: str | None) -> dict[str, float]:
    """A task's resources."""
    return {MEMORY: float(memory), DISK: float(disk), **({} if tag is None else {_TAG + tag: 1.0})}


def tags_of(resources: Collection[str]) -> frozenset[str]:
    """The tags among the names of resources."""
    return frozenset(name.removeprefix(_TAG) for name in resources if name.startswith(_TAG))


def is_ours(resources: Collection[str]) -> bool:
    """Whether a Dask worker is one of ``convert batch worker``, which offer memory and disk."""
    return MEMORY in resources and DISK in resources


def fits(wanted: Mapping[str, float], worker: Mapping[str, float]) -> bool:
    """Whether an idle worker could do a task."""
    return all(name in worker and worker[name] >= size for name, size in wanted.items())
