"""What a failure is classed as, and what a class means for its job."""

import pytest

from converter.batch.failures import AdapterError, classify, verdict
from converter.batch.watchlist import Retries
from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.execute.folder import BusyError

RETRIES = Retries(first_wait=10, longest_wait=45, gated_wait=1000)


@pytest.mark.parametrize(
    ("kind", "attempts", "crashes", "state", "wait"),
    [
        ("hub", 1, 0, "queued", 10),
        ("hub", 2, 0, "queued", 20),
        ("hub", 4, 0, "queued", 45),
        ("hub", 5, 0, "parked", 0),
        ("disk", 4, 0, "queued", 45),
        ("refused", 2, 0, "queued", 20),
        ("refused", 3, 0, "parked", 0),
        ("unsupported", 1, 0, "parked", 0),
        ("gate", 1, 0, "parked", 0),
        ("usage", 1, 0, "parked", 0),
        ("failed", 1, 0, "parked", 0),
        ("gated", 9, 0, "waiting", 1000),
        ("resources", 9, 0, "waiting", 1000),
        ("adapter", 9, 0, "waiting", 1000),
        ("crash", 1, 1, "queued", 10),
        ("crash", 1, 2, "quarantined", 0),
        ("internal", 1, 2, "quarantined", 0),
    ],
)
def test_what_a_failure_means(kind, attempts, crashes, state, wait):
    found = verdict(kind, attempts=attempts, crashes=crashes, lost=0, retries=RETRIES)
    assert (found.state, found.wait) == (state, wait)


def hub_error(status: int | None, gated: bool = False) -> HubError:
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    error = HubError("said")
    if status is not None:
        response = httpx2.Response(status, request=httpx2.Request("GET", "http://hub"))
        error.__cause__ = (GatedRepoError if gated else HfHubHTTPError)("x", response=response)
    return error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PlanError(["x"]), "unsupported"),
        (GateError("x"), "gate"),
        (UsageError("x"), "usage"),
        (AdapterError("x"), "adapter"),
        (BusyError("another process is at it"), "disk"),
        (ConvertError("x"), "failed"),
        (caused(ConvertError("x"), OSError(28, "full")), "disk"),
        (OSError(5, "failing"), "disk"),
        (hub_error(None), "hub"),
        (hub_error(503), "hub"),
        (hub_error(409), "hub"),
        (hub_error(429), "hub"),
        (hub_error(404), "refused"),
        (hub_error(403), "refused"),
        (hub_error(403, gated=True), "gated"),
        (caused(HubError("x"), OSError(28, "full")), "disk"),
        (MemoryError(), "crash"),
        (KeyError("x"), "internal"),
    ],
    ids=repr,
)
def test_classes_of_failures(error, kind):
    assert classify(error).kind == kind


def test_failures_hide_tokens():
    assert "abcdefgh" not in classify(RuntimeError("token hf_abcdefghijkl")).text
