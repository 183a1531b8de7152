"""MiniCPM's resampler: learned queries that attend to the patches of a picture."""

from __future__ import annotations

from arch_maps.ops import Slice
from arch_maps.rules import Kind, Mount


def resampler(at: Mount, *, queries: int, hidden: int, patches: int) -> None:
    """Queries, one attention whose three projections are one tensor, norms, the last matrix.

    ``hidden`` is the text's width, ``patches`` the tower's.
    """
    at.tensor("query", queries, hidden, kind=Kind.POSITION)
    if int(patches) != int(hidden):
        at.linear("kv_proj", hidden, patches)
    joined = at / "attn"
    for leaf, inp, kind in (("weight", (hidden,), Kind.LINEAR), ("bias", (), Kind.BIAS)):
        whole = joined.input(f"in_proj_{leaf}", 3 * hidden, *inp)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            first = index * int(hidden)
            part = Slice(whole, 0, first, first + int(hidden))
            joined.rule(f"{name}.{leaf}", part, kind)
    joined.linear("out_proj", hidden, hidden, bias=True)
    for name in ("ln_q", "ln_kv", "ln_post"):
        at.norm(name, hidden, bias=True)
    at.tensor("proj", hidden, hidden, kind=Kind.LINEAR)
    at.drop("pos_embed", "positions follow from the picture's size")
