"""Chat template, stop tokens and thinking: what stands between a person and the weights."""

from collections.abc import Callable
from typing import Any, Final

from validate.acceptance import needs
from validate.acceptance.bench import QUESTION, TOKENS, Bench
from validate.acceptance.model import Found, Row, RowFailure

_PUSH: Final = 100.0
"""Added to a logit, so that its token is the greedy choice whatever the weights say."""
_BUDGET: Final = 6


def _prompt_facts(bench: Bench, runtime: str) -> dict[str, Any]:
    facts: dict[str, Any] = bench.session(runtime)["prompt"]
    bench.commands.append(f"python: from {runtime} import load; the chat template and stop tokens")
    if "error" in facts:
        raise RowFailure(str(facts["error"]))
    return facts


def _template(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        facts = _prompt_facts(bench, runtime)
        rendered, expected = facts["rendered"], facts.get("expected")
        if expected is None:
            raise RowFailure("the runtime's tokenizer has no chat template, the checkpoint has one")
        if rendered != expected:
            raise RowFailure(f"the runtime writes {rendered!r}, the template {expected!r}")
        if facts["word"] not in rendered:
            raise RowFailure(f"the rendered prompt lacks the message: {rendered!r}")
        return Found(note=f"rendered as the template says: {rendered!r}")

    return run


def _stops(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        facts = _prompt_facts(bench, runtime)
        declared, stops = bench.facts.stop_ids, facts["stops"]
        missing = [i for i in declared if i not in stops]
        if missing:
            raise RowFailure(
                f"the checkpoint says to stop at {list(declared)}, but the runtime stops at {stops}"
            )
        ordinary = [i for i in declared if i not in bench.facts.tokens.values()]
        if ordinary and bench.facts.tokens:
            raise RowFailure(
                f"eos_token_id {ordinary[0]} is no special token of the tokenizer: answers would "
                "end in the middle of a sentence"
            )
        end = facts.get("turn_end")
        if end is not None and end not in stops:
            raise RowFailure(
                f"the chat template ends an answer with {facts['names'][str(end)]} ({end}), at "
                f"which the runtime does not stop (it stops at {stops}): answers would run on"
            )
        server = bench.server(runtime)
        for token in declared:
            reply = server.chat(QUESTION, max_tokens=TOKENS, logit_bias={str(token): _PUSH})
            if reply.finish != "stop" or reply.completion_tokens > 1:
                raise RowFailure(
                    f"pushed to token {token} by logit_bias, the server wrote "
                    f"{reply.completion_tokens} tokens and ended with {reply.finish!r}"
                )
        names = [facts.get("names", {}).get(str(i), "") for i in declared]
        return Found(
            note="the server stops at "
            + ", ".join(f"{i} {name}".strip() for i, name in zip(declared, names, strict=True))
            + (", one of which ends an answer in the template" if end is not None else "")
        )

    return run


def _thinking(bench: Bench) -> Found:
    server = bench.server("mlx_vlm")
    think = {"enable_thinking": True, "max_tokens": 4 * _BUDGET}
    free = server.chat(QUESTION, **think)
    kept = server.chat(QUESTION, **think, thinking_budget=_BUDGET)
    # A line break and the closing token are forced after the budget is used up.
    if kept.text == free.text and free.completion_tokens > _BUDGET + 2:
        raise RowFailure(f"thinking_budget {_BUDGET} changes nothing: {kept.text!r}")
    data = server.post(
        "/v1/chat/completions",
        server.body(QUESTION, 4 * _BUDGET, {"enable_thinking": True, "thinking_budget": _BUDGET}),
    )
    tokens = [one["token"] for one in data["choices"][0]["logprobs"]["content"]]
    if needs.THINK[1] not in tokens:
        raise RowFailure(f"no {needs.THINK[1]} within {len(tokens)} tokens: {tokens}")
    at = tokens.index(needs.THINK[1])
    if at > _BUDGET + 2:
        raise RowFailure(f"{needs.THINK[1]} came after {at} tokens with a budget of {_BUDGET}")
    return Found(note=f"{needs.THINK[1]} after {at} tokens with a budget of {_BUDGET}")


_STOP_RULE: Final = (
    "the runtime stops at every declared eos_token_id, each is a special token, the one that ends "
    "an answer in the chat template is among them, and the server ends with 'stop' when logit_bias "
    "makes one the greedy choice"
)

ROWS: Final = (
    Row(
        name="chat template",
        runtime="mlx_vlm",
        rule="the runtime renders a message as the checkpoint's template does in transformers",
        run=_template("mlx_vlm"),
        needs=(needs.chats,),
    ),
    Row(
        name="stop tokens",
        runtime="mlx_vlm",
        rule=_STOP_RULE,
        run=_stops("mlx_vlm"),
        needs=(needs.stops,),
    ),
    Row(
        name="thinking budget",
        runtime="mlx_vlm",
        rule=f"with a budget of {_BUDGET} the thought is closed after at most {_BUDGET} + 2 tokens",
        run=_thinking,
        needs=(needs.chats, needs.thinks),
    ),
    Row(
        name="chat template",
        runtime="mlx_lm",
        rule="the runtime renders a message as the checkpoint's template does in transformers",
        run=_template("mlx_lm"),
        needs=(needs.chats,),
    ),
    Row(
        name="stop tokens",
        runtime="mlx_lm",
        rule=_STOP_RULE,
        run=_stops("mlx_lm"),
        needs=(needs.stops,),
    ),
)
