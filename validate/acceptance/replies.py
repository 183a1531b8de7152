"""Answers, and the rule by which two of them are the same text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from validate.acceptance.model import RowFailure

TIES: Final = 2.0
"""A token may change where its lead is at most this many times the measured noise: the two
log-probabilities move against each other by at most the noise each."""
CEILINGS: Final = {"float32": 1e-3, "16 bits": 0.1}
"""Nats: log-probabilities of the same tokens that differ by more differ by no rounding."""
ROUNDING: Final = {"float32": 1e-3, "16 bits": 0.5}
"""Nats: how far computing so may move log-probabilities from torch's in float32. Those of a 4-bit
twin of Qwen3-VL, whose weights are random, are moved by 16 bits by up to 0.32, at its 975 positions
by 0.07 in the mean square."""
SAME: Final = (
    "the same text token by token; where one parts, the token it left led by no more than twice "
    "the largest difference of log-probabilities measured on the tokens before (a near tie), which "
    "itself is at most "
    + " or ".join(f"{nats:g} nats computing in {what}" for what, nats in CEILINGS.items())
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token of an answer."""

    token: str
    logprob: float | None
    """None where the runtime does not tell."""
    lead: float | None
    """Log-probability over that of the second choice; None where the runtime does not tell."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer of a runtime."""

    text: str
    steps: tuple[Step, ...] = ()
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    """Tokens that a drafter proposed."""


@dataclass(frozen=True, kw_only=True)
class Sameness:
    """How far answers that should be the same are."""

    equal: int
    ties: int
    noise: float
    """Largest difference of log-probabilities on the tokens before any parting."""

    def metrics(self) -> dict[str, float | int | str]:
        """For the row."""
        return {"texts": self.equal + self.ties, "near ties": self.ties, "noise": self.noise}

    def __str__(self) -> str:
        total = self.equal + self.ties
        texts = "1 text" if total == 1 else f"{total} texts"
        parted = f", {self.ties} parted at a near tie" if self.ties else ""
        return f"{texts} the same{parted}; log-probabilities within {self.noise:.2g}"


def require_same(
    pairs: Sequence[tuple[str, Reply, Reply]], *, computing: str, noise: float = 0.0
) -> Sameness:
    """Hold (what, reference, other) against the rule ``SAME``; RowFailure names what differs.

    ``computing``: ``float32`` or ``16 bits``; ``noise``: what was measured elsewhere, for replies
    that tell no log-probabilities.
    """
    measured = {what: noise_of(a, b) for what, a, b in pairs}
    noise = max(noise, *measured.values()) if measured else noise
    ceiling = CEILINGS[computing]
    if noise > ceiling:
        bad = [what for what, value in measured.items() if value > ceiling]
        raise RowFailure(
            f"log-probabilities of the same tokens differ by {noise:.2g} nats, which computing in "
            f"{computing} does not explain ({len(bad)} of {len(pairs)} answers: {'; '.join(bad)})"
        )
    ties = 0
    for what, wanted, got in pairs:
        if same_text(wanted, got):
            continue
        at = shared(wanted, got)
        lead = wanted.steps[at].lead if at < len(wanted.steps) else None
        if lead is None or lead > TIES * noise:
            raise RowFailure(
                f"{what}: {got.text!r} instead of {wanted.text!r}; they part at token {at}, where "
                + (f"the first choice led by {lead:.3g} nats" if lead is not None else "one ends")
                + f" and the noise is {noise:.2g}"
            )
        ties += 1
    return Sameness(equal=len(pairs) - ties, ties=ties, noise=noise)


def same_text(a: Reply, b: Reply) -> bool:
    """Whether two answers say the same, by their tokens where both tell them.

    mlx-vlm's server strips the texts that it sends whole, and what becomes of a character whose
    last bytes are still to come differs between its interfaces.
    """
    if a.steps and b.steps:
        return len(a.steps) == len(b.steps) == shared(a, b)
    return a.text.strip() == b.text.strip()


def shared(a: Reply, b: Reply) -> int:
    """Tokens before the two part."""
    pairs = zip(a.steps, b.steps, strict=False)
    lengths = min(len(a.steps), len(b.steps))
    return next((i for i, (x, y) in enumerate(pairs) if x.token != y.token), lengths)


def noise_of(a: Reply, b: Reply) -> float:
    """Largest difference of log-probabilities on the tokens before two answers part, nats.

    Not at the parting, where the difference is what is to be judged.
    """
    count = shared(a, b)
    pairs = zip(a.steps[:count], b.steps[:count], strict=True)
    told = [(x.logprob, y.logprob) for x, y in pairs]
    return max((abs(x - y) for x, y in told if x is not None and y is not None), default=0.0)
