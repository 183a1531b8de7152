"""Refusals that a damaged answer of the hub could have made, believed only when they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from converter.errors import HubError, PlanError, UsageError

READINGS: Final = 3
"""The same refusal so often is the release's own."""
Result = TypeVar("Result")


def believed(repo: str, read: Callable[[], Result]) -> Result:
    """What ``read`` gives, which reads headers of ``repo`` by range requests.

    No hash covers these, so a refusal (PlanError, UsageError) is raised only when all readings
    say the same; HubError when they differ.
    """
    said: PlanError | UsageError | None = None
    for _ in range(READINGS):
        try:
            found = read()
        except (PlanError, UsageError) as error:
            if said is not None and str(error) != str(said):
                raise HubError(
                    f"{repo}: two readings of its headers differ; the hub sends damaged answers"
                ) from error
            said = error
        else:
            return found
    assert said is not None
    raise said
