"""The huggingface_hub client as this program uses it: who it is, and how long it keeps trying."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from converter.hub.errors import asked_wait, may_have_been_done, status_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all), from any thread but never from two at once."""

LIBRARY = "mlx-dayzero"
TIMEOUT_S = 30.0
ATTEMPTS = 4
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 300.0
"""Rate limits of the hub are counted over five minutes."""

Result = TypeVar("Result")


def client(*, endpoint: str | None = None, token: str | None = None) -> "HfApi":
    """The hub's client; None means HF_ENDPOINT, and the token of `hf auth login` or HF_TOKEN."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token, library_name=LIBRARY)


def pause(failures: int, *, least: float = 0.0, stopped: threading.Event | None = None) -> bool:
    """Wait before trying again, longer after each failure; whether ``stopped`` ended it."""
    seconds = least + FIRST_WAIT_S * 2**failures
    if stopped is not None:
        return stopped.wait(seconds)
    time.sleep(seconds)
    return False


def patiently(
    call: Callable[[], Result],
    *,
    attempts: int = ATTEMPTS,
    also: tuple[type[Exception], ...] = (),
    stopped: threading.Event | None = None,
) -> Result:
    """The result of a call without side effects, tried again while the hub or network fails.

    Errors of the types in ``also`` are taken for failures that pass, too. Where a long series of
    attempts is allowed, a hub that says how long to wait is believed. Once ``stopped`` is set
    nothing is tried again.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            busy = may_have_been_done(error) or status_of(error) == 429
            if not (busy or isinstance(error, also)) or attempt == attempts - 1:
                raise
            least = min(LONGEST_WAIT_S, asked_wait(error)) if attempts > ATTEMPTS else 0.0
            if pause(attempt, least=least, stopped=stopped):
                raise
    raise AssertionError("unreachable")


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without the client's own progress bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable
    from huggingface_hub.utils.tqdm import enable_progress_bars as enable

    before = are_progress_bars_disabled()
    if not before:
        disable()
    try:
        yield
    finally:
        if not before:
            enable()
