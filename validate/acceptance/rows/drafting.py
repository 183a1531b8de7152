"""Speculative decoding with a drafter: faster where it guesses well, never another text."""

from dataclasses import replace
from typing import Final

from validate.acceptance import needs
from validate.acceptance.bench import TOKENS, Bench
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.replies import SAME, Reply, noise_of
from validate.acceptance.rows.generate import printed
from validate.acceptance.rows.serving import questions

_COUNT: Final = 3


def _generate(bench: Bench) -> Found:
    wanted = bench.python("mlx_vlm", "text")["text"]
    shown = printed(bench, "mlx_vlm", "--draft-model", str(bench.facts.drafter))
    if "falling back" in shown:
        raise RowFailure(shown)
    if wanted not in shown:
        raise RowFailure(f"with the drafter {shown!r}, without {wanted!r}")
    told = [line for line in shown.splitlines() if "peculative" in line or "accept" in line.lower()]
    return Found(note="; ".join(["the same greedy text", *told]))


def _server(bench: Bench) -> Found:
    asked = questions(_COUNT)
    plain = [bench.server("mlx_vlm").chat(one, max_tokens=TOKENS) for one in asked]
    batched = bench.server("mlx_vlm").together(asked, max_tokens=TOKENS)
    noise = max(noise_of(a, b) for a, b in zip(plain, batched, strict=True))
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
        rule="generate --draft-model prints the greedy text that it prints without a drafter",
        run=_generate,
        needs=(needs.has_drafter,),
    ),
    Row(
        name="speculative decoding, server",
        runtime="mlx_vlm",
        rule=f"the server drafts, and against one without a drafter: {SAME}; the noise is that of "
        "three requests at once on the server without",
        run=_server,
        needs=(needs.has_drafter,),
    ),
)
