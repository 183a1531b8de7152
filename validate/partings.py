"""Where the first choices of two computations part, in the words of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from validate.checks import Check, Parting
from validate.metrics import log_softmax

SHOWN: Final = 8
"""Partings kept of one prompt: those that the reference was surest about."""
_BEFORE: Final = 8
"""Tokens shown before a parting."""
_MOST_BEFORE: Final = 60
"""Characters of them at most, the last ones."""
_UNDECODED: Final = "\ufffd"


class Words:
    """Text of token ids; their numbers where there is no tokenizer."""

    def __init__(self, tokenizer: Any | None = None) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, folder: Path, *, trust_remote_code: bool = False) -> Words:
        """With the tokenizer of a folder."""
        from validate.processor import load_tokenizer

        return cls(load_tokenizer(folder, trust_remote_code=trust_remote_code))

    def token(self, token: int) -> str:
        """One token: its text, or its name in the vocabulary where it is a part of a character."""
        if self._tokenizer is None:
            return f"#{token}"
        text = str(self._tokenizer.decode([token]))
        if text and _UNDECODED not in text:
            return text
        return str(self._tokenizer.convert_ids_to_tokens([token])[0] or f"#{token}")

    def end(self, ids: Sequence[int]) -> str:
        """The last words of a text; whole characters alone."""
        if self._tokenizer is None:
            return " ".join(f"#{token}" for token in ids[-_BEFORE:])
        text = str(self._tokenizer.decode(list(ids[-_BEFORE:])))
        return text.strip(_UNDECODED)[-_MOST_BEFORE:]


def partings(
    reference: ArrayLike, other: ArrayLike, words: Words, *, ids: Sequence[int], fed: int
) -> tuple[Parting, ...]:
    """Positions of two [positions, vocabulary] logits whose first choices differ, surest first.

    Position k is chosen after ``ids[: fed + k]``; where ``ids`` are fewer, as of a decoder apart
    from what it answers, the text before is not told. At most ``SHOWN``; none for unequal shapes.
    """
    a, b = np.asarray(reference), np.asarray(other)
    if a.shape != b.shape or a.ndim != 2:
        return ()
    first, instead = a.argmax(axis=1), b.argmax(axis=1)
    found = []
    for position in np.flatnonzero(first != instead):
        row = log_softmax(a[position])
        lead = float(row[first[position]] - row[instead[position]])
        found.append((lead if np.isfinite(lead) else float("inf"), int(position)))
    told = len(ids) >= fed + len(a) - 1
    return tuple(
        Parting(
            position=position,
            before=words.end(ids[: fed + position]) if told else "",
            wanted=words.token(int(first[position])),
            got=words.token(int(instead[position])),
            lead=lead,
        )
        for lead, position in sorted(found, key=lambda one: (-one[0], one[1]))[:SHOWN]
    )


def with_partings(check: Check, found: Sequence[tuple[Parting, ...]]) -> Check:
    """The check with what was found of each of its prompts, in their order."""
    cases = zip(check.cases, found, strict=True)
    return replace(check, cases=tuple(replace(case, partings=one) for case, one in cases))
