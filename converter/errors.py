"""What this program raises: one class per exit status, each message one readable paragraph."""

from collections.abc import Iterable
from typing import Final

MAX_PROBLEM: Final = 2000
"""Characters of one problem; a message is no place for a hostile file's content."""


def one_line(text: str) -> str:
    """``text`` as a line of bounded length that cannot forge others, or colours."""
    text = _cut(text)
    if text.isprintable():
        return text
    return _cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _cut(text: str) -> str:
    if len(text) <= MAX_PROBLEM:
        return text
    return f"{text[: MAX_PROBLEM // 2]} ... {text[-MAX_PROBLEM // 4 :]}"


class ConvertError(Exception):
    """A failure with a message made for the user; `exit_code` is the process exit status."""

    exit_code = 1


class UsageError(ConvertError):
    """The command line or an argument cannot be honoured."""

    exit_code = 2


class PlanError(ConvertError):
    """An unsupported or faulty source; holds every problem found, not just the first.

    Each is one line of bounded length whatever it quotes, and cannot forge lines or colours.
    """

    exit_code = 3

    def __init__(self, problems: Iterable[str]) -> None:
        told = (problems,) if isinstance(problems, str) else problems
        self.problems: tuple[str, ...] = tuple(map(one_line, told))
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class GateError(ConvertError):
    """The checkpoint is sound but did not meet a gate that publishing requires."""

    exit_code = 4


class HubError(ConvertError):
    """The hub or the network refused; the message says what to do and never holds a token."""

    exit_code = 5
