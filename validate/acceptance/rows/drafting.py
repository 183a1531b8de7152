"""Speculative decoding with a drafter: faster where it guesses well, never another text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from validate.acceptance import needs
from validate.acceptance.bench import TOKENS, Bench, reply_of
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.replies import SAME, Reply, Step, noise_of
from validate.acceptance.rows.generate import printed
from validate.acceptance.rows.serving import questions

_COUNT: Final = 3


def _generate(bench: Bench) -> Found:
    wanted = bench.python("mlx_vlm", "text")
    shown = printed(bench, "mlx_vlm", "--draft-model", str(bench.facts.drafter))
    if "falling back" in shown:
        raise RowFailure(shown)
    told = [line for line in shown.splitlines() if "peculative" in line or "accept" in line.lower()]
    if wanted["text"] in shown:
        return Found(note="; ".join(["the same greedy text", *told]))
    plain = reply_of(wanted)
    at, common = parting(plain, wanted["so far"], shown)
    if not common:
        raise RowFailure(f"with the drafter {shown!r}, without {plain.text!r}")
    other = Step(token="", logprob=None, lead=None)  # the command line prints texts alone
    drafted = Reply(text=shown, steps=(*plain.steps[:at], other))
    same = bench.same([("with the drafter", plain, drafted)], noise=_rounding(bench))
    return Found(note="; ".join([f"{common!r} and then a near tie ({same})", *told]))


def parting(plain: Reply, texts: Sequence[str], shown: str) -> tuple[int, str]:
    """Where a printed text leaves an answer: index of the token, and the text before it.

    ``texts`` are the answer's after each token. Tokens without a text of their own cannot be seen
    in print; of those at the place, the one that led least is taken.
    """
    ends = [text.rstrip("\ufffd") for text in texts]  # the rest of a character is still to come
    after = next((i for i, end in enumerate(ends) if end not in shown), len(ends) - 1)
    common = ends[after - 1] if after else ""
    first = ends.index(common) + 1 if common else 0
    leads = {i: lead for i in range(first, after + 1) if (lead := plain.steps[i].lead) is not None}
    return min(leads, key=lambda i: leads[i], default=after), common


def _rounding(bench: Bench) -> float:
    """What reading several tokens at once does to log-probabilities, as checking drafts does."""
    pairs = bench.python("mlx_vlm", "resumed")["resumed"]
    return max((abs(a - b) for a, b in pairs), default=0.0)


def _server(bench: Bench) -> Found:
    asked = questions(_COUNT)
    plain = [bench.server("mlx_vlm").chat(one, max_tokens=TOKENS) for one in asked]
    batched = bench.server("mlx_vlm").together(asked, max_tokens=TOKENS)
    noise = max(_rounding(bench), *(noise_of(a, b) for a, b in zip(plain, batched, strict=True)))
    server = bench.server("mlx_vlm", "drafter", flags=("--draft-model", str(bench.facts.drafter)))
    try:
        drafted = [_untold(server.chat(one, max_tokens=TOKENS)) for one in asked]
        if "falling back" in server.log():
            raise RowFailure("the server says that the drafter does not fit and goes on without it")
    finally:
        bench.stop_server("mlx_vlm", "drafter")
    count = sum(one.drafted for one in drafted)
    if not count:
        raise RowFailure("the server counts no drafted token")
    same = bench.same(list(zip(asked, plain, drafted, strict=True)), noise=noise)
    return Found(
        note=f"{count} tokens drafted; {same}", metrics={"drafted": count, **same.metrics()}
    )


def _untold(reply: Reply) -> Reply:
    """Without log-probabilities: with a drafter the server computes none and tells zeros."""
    steps = tuple(replace(step, logprob=None, lead=None) for step in reply.steps)
    return replace(reply, steps=steps)


ROWS: Final = (
    Row(
        name="speculative decoding, generate",
        runtime="mlx_vlm",
        rule=f"generate --draft-model prints the greedy text that it prints without: {SAME}; the "
        "noise is that of reading the tokens of an answer at once instead of one by one",
        run=_generate,
        needs=(needs.has_drafter,),
    ),
    Row(
        name="speculative decoding, server",
        runtime="mlx_vlm",
        rule=f"the server drafts, and against one without a drafter: {SAME}; the noise is that of "
        "three requests at once on the server without, and of reading several tokens at once",
        run=_server,
        needs=(needs.has_drafter,),
    ),
)
