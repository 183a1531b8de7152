"""Speculative decoding with a drafter: faster where it guesses well, never another text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from validate.acceptance import needs
from validate.acceptance.bench import TOKENS, Bench, reply_of
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.replies import CEILINGS, SAME, Reply, Step
from validate.acceptance.rows.generate import printed
from validate.acceptance.rows.serving import questions

_COUNT: Final = 3
_NO_CHARACTER: Final = "\ufffd"
_UNTOLD: Final = (
    "with a drafter the runtime tells no log-probabilities, so the noise that is allowed at most "
    "stands for it"
)


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
    same = bench.same([("with the drafter", plain, drafted)], noise=CEILINGS[bench.facts.computing])
    return Found(note="; ".join([f"{common!r} and then a near tie ({same})", *told]))


def parting(plain: Reply, texts: Sequence[str], shown: str) -> tuple[int, str]:
    """Where a printed text leaves an answer: index of the token, and the text before it.

    ``texts`` are the answer's after each token. Tokens without a text of their own cannot be seen
    in print, nor bytes that are no character; of those at the place, the one that led least is
    taken.
    """
    shown = shown.replace(_NO_CHARACTER, "")
    ends = [text.replace(_NO_CHARACTER, "") for text in texts]
    after = next((i for i, end in enumerate(ends) if end not in shown), len(ends) - 1)
    common = ends[after - 1] if after else ""
    first = ends.index(common) + 1 if common else 0
    last = min(after, len(plain.steps) - 1)  # a runtime may flush one more text at the end
    leads = {i: lead for i in range(first, last + 1) if (lead := plain.steps[i].lead) is not None}
    return min(leads, key=lambda i: leads[i], default=last), common


def _server(bench: Bench) -> Found:
    asked = questions(_COUNT)
    plain = [bench.server("mlx_vlm").chat(one, max_tokens=TOKENS) for one in asked]
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
    pairs = list(zip(asked, plain, drafted, strict=True))
    same = bench.same(pairs, noise=CEILINGS[bench.facts.computing])
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
        rule=f"generate --draft-model prints the greedy text that it prints without: {SAME}; "
        f"{_UNTOLD}",
        run=_generate,
        needs=(needs.has_drafter,),
    ),
    Row(
        name="speculative decoding, server",
        runtime="mlx_vlm",
        rule=f"the server drafts, and against one without a drafter: {SAME}; {_UNTOLD}",
        run=_server,
        needs=(needs.has_drafter,),
    ),
)
