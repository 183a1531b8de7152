"""Prefix caches, in memory and on disk, and quantized KV caches."""

from collections.abc import Callable
from typing import Final

from validate.acceptance import needs
from validate.acceptance.bench import TOKENS, Bench
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.replies import SAME, Reply, Sameness, noise_of, same_text, shared
from validate.acceptance.rows.serving import questions
from validate.acceptance.server import Server

# Prefixes are kept in blocks of 16 tokens (APC_BLOCK_SIZE): the text spans several.
_TEXT: Final = "It was the third day of rain, and the path to the mill was under water. " * 6
_ASKED: Final = (f"{_TEXT}What happened?", f"{_TEXT}Who was waiting?")
_APC: Final = "prefix cache"


def _apc_server(bench: Bench) -> Server:
    folder = bench.work / "prefix-cache"
    settings = {"APC_ENABLED": "1", "APC_DISK_PATH": str(folder)}
    return bench.server("mlx_vlm", _APC, settings=settings)


def _ask(server: Server, content: str) -> Reply:
    return server.chat(content, max_tokens=TOKENS)


def _warm(bench: Bench, what: str, cold: Reply, warm: Reply) -> Sameness:
    if not warm.cached_tokens:
        raise RowFailure(f"{what}: usage counts no cached token of {warm.prompt_tokens}")
    return bench.same([(what, cold, warm)])


def _memory(bench: Bench) -> Found:
    plain = [_ask(bench.server("mlx_vlm"), one) for one in _ASKED]
    server = _apc_server(bench)
    first = _ask(server, _ASKED[0])
    bench.same([("the first request", plain[0], first)])
    again, other = (_ask(server, one) for one in _ASKED)
    same = _warm(bench, "the same request", plain[0], again)
    if other.cached_tokens:
        bench.same([("another ending", plain[1], other)])
    return Found(
        note=f"{again.cached_tokens} of {again.prompt_tokens} tokens from the cache, "
        f"{other.cached_tokens} with another ending; {same}",
        metrics={"cached": again.cached_tokens, "prompt tokens": again.prompt_tokens},
    )


def _disk(bench: Bench) -> Found:
    plain = _ask(bench.server("mlx_vlm"), _ASKED[0])
    _ask(_apc_server(bench), _ASKED[0])
    bench.stop_server("mlx_vlm", _APC)
    again = _ask(_apc_server(bench), _ASKED[0])
    same = _warm(bench, "after a restart", plain, again)
    return Found(
        note=f"{again.cached_tokens} of {again.prompt_tokens} tokens from disk after a restart; "
        f"{same}",
        metrics={"cached": again.cached_tokens, "prompt tokens": again.prompt_tokens},
    )


def _lm_prefix(bench: Bench) -> Found:
    server = bench.server("mlx_lm")
    replies = [_ask(server, _ASKED[1]) for _ in "12"]
    same = _warm(bench, "the same request", *replies)
    return Found(
        note=f"{replies[1].cached_tokens} of {replies[1].prompt_tokens} tokens from the cache; "
        f"{same}",
        metrics={"cached": replies[1].cached_tokens, "prompt tokens": replies[1].prompt_tokens},
    )


def _quantized(runtime: str, name: str, *flags: str) -> Callable[[Bench], Found]:
    """A server whose KV cache is quantized from the first token on."""

    def run(bench: Bench) -> Found:
        size = bench.facts.head_dim
        group = next((g for g in needs.KV_GROUPS if size is None or size % g == 0), 64)
        given = (*flags, "--kv-group-size", str(group), "--quantized-kv-start", "0")
        asked = [_TEXT + one for one in questions(2)]
        plain = [_ask(bench.server(runtime), one) for one in asked]
        server = bench.server(runtime, name, flags=given)
        try:
            small = [_ask(server, one) for one in asked]
        finally:
            bench.stop_server(runtime, name)
        moved = max(noise_of(a, b) for a, b in zip(plain, small, strict=True))
        if not moved and all(same_text(a, b) for a, b in zip(plain, small, strict=True)):
            raise RowFailure("no log-probability moves: the cache was not quantized")
        equal = sum(shared(a, b) for a, b in zip(plain, small, strict=True))
        total = sum(len(a.steps) for a in plain)
        return Found(
            note=f"{equal} of {total} greedy tokens as with a float cache before the first other "
            f"one; log-probabilities before it move by up to {moved:.2g}",
            metrics={"equal tokens": equal, "tokens": total, "moved": moved},
        )

    return run


_KV_RULE: Final = (
    "the server answers to the end with a cache that is quantized (log-probabilities move); how "
    "much the text differs from a float cache's is told, not gated"
)

ROWS: Final = (
    Row(
        name="prefix cache in memory",
        runtime="mlx_vlm",
        rule=f"a repeated request counts cached tokens; {SAME}",
        run=_memory,
    ),
    Row(
        name="prefix cache on disk",
        runtime="mlx_vlm",
        rule=f"a request repeated after a restart counts cached tokens; {SAME}",
        run=_disk,
    ),
    Row(
        name="KV cache uniform 8",
        runtime="mlx_vlm",
        rule=_KV_RULE,
        run=_quantized("mlx_vlm", "uniform 8", "--kv-bits", "8", "--kv-quant-scheme", "uniform"),
        needs=(needs.quantizable_cache, needs.quantizes_layers),
    ),
    Row(
        name="KV cache turboquant 3.5",
        runtime="mlx_vlm",
        rule=_KV_RULE,
        run=_quantized(
            "mlx_vlm", "turboquant", "--kv-bits", "3.5", "--kv-quant-scheme", "turboquant"
        ),
        needs=(needs.quantizes_layers,),
    ),
    Row(
        name="prefix cache in memory",
        runtime="mlx_lm",
        rule=f"a repeated request counts cached tokens; {SAME}",
        run=_lm_prefix,
    ),
    Row(
        name="KV cache uniform 8",
        runtime="mlx_lm",
        rule=_KV_RULE,
        run=_quantized("mlx_lm", "uniform 8", "--kv-bits", "8"),
        needs=(needs.quantizable_cache,),
    ),
)
