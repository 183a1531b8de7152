"""The servers: health, answers whole and streamed, pictures, several requests at once."""

import json
import time
from collections.abc import Callable
from typing import Any, Final

from validate.acceptance import needs
from validate.acceptance.bench import QUESTION, TOKENS, Bench, reply_of
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.replies import SAME
from validate.acceptance.server import picture_content

_LONG: Final = 8
"""Times the length of an answer: another one fits into it."""
_SUBJECTS: Final = (
    "rain",
    "the old harbour in winter",
    "bread",
    "how a lighthouse is built and who keeps it",
    "a cat on a wall, a dog below it and the man who owns both",
    "numbers",
    "the river that came over the lower field after the third day of rain",
    "glass",
)
_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "round": {"type": "boolean"}},
    "required": ["colour", "round"],
    "additionalProperties": False,
}


def questions(count: int) -> list[str]:
    """Questions of unequal lengths."""
    return [f"Write about {subject}." for subject in _SUBJECTS[:count]]


def _health(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        data = bench.server(runtime).get("/health")
        if data.get("status") not in ("healthy", "ok"):
            raise RowFailure(f"/health answers {json.dumps(data)}")
        loaded = data.get("loaded_model")
        if loaded is not None and str(loaded) != str(bench.facts.folder):
            raise RowFailure(f"/health names the model {loaded}, not {bench.facts.folder}")
        return Found(note=json.dumps({k: data[k] for k in list(data)[:2]}))

    return run


def _chat(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        reply = bench.server(runtime).chat(QUESTION, max_tokens=TOKENS)
        wanted = reply_of(bench.python(runtime, "text"), ids=runtime == "mlx_lm")
        if not reply.completion_tokens:
            raise RowFailure("the answer has no token")
        told = f"{reply.completion_tokens} tokens, {reply.finish}"
        if reply.prompt_tokens != wanted.prompt_tokens and not bench.facts.template:
            return Found(
                note=f"{told}; without a chat template the server writes a prompt of its own"
            )
        same = bench.same([("beside the Python call", wanted, reply)])
        return Found(note=f"{told}; {same}", metrics=same.metrics())

    return run


def _stream(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        server = bench.server(runtime)
        whole = server.chat(QUESTION, max_tokens=TOKENS)
        streamed = server.stream(QUESTION, max_tokens=TOKENS)
        if streamed.text.strip() != whole.text.strip():
            raise RowFailure(f"streamed {streamed.text!r}, whole {whole.text!r}")
        return Found(note=f"the same text, ended with {streamed.finish} and [DONE]")

    return run


def _picture(bench: Bench) -> Found:
    server = bench.server("mlx_vlm")
    replies = [
        server.chat(picture_content(path, QUESTION), max_tokens=TOKENS)
        for path in (bench.media.image, bench.media.other_image)
    ]
    wanted = reply_of(bench.python("mlx_vlm", "image"))
    same = bench.same([("beside the Python call", wanted, replies[0])])
    first = [reply.steps[0] for reply in replies if reply.steps]
    if len(first) == 2 and first[0] == first[1]:
        raise RowFailure("the answer does not depend on the picture")
    return Found(
        note=f"{replies[0].prompt_tokens} prompt tokens with the picture; {same}",
        metrics=same.metrics(),
    )


def _concurrent(runtime: str, count: int) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        server = bench.server(runtime)
        asked = questions(count)
        alone = [server.chat(one, max_tokens=TOKENS) for one in asked]
        together = server.together(asked, max_tokens=TOKENS)
        same = bench.same(list(zip(asked, alone, together, strict=True)))
        return Found(note=str(same), metrics=same.metrics())

    return run


def _joined(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        server, never = bench.server(runtime), bench.facts.stop_ids
        asked, lengths = questions(2), (_LONG * TOKENS, TOKENS)
        began = time.monotonic()
        alone = [server.unending(asked[0], max_tokens=lengths[0], never=never)]
        took = time.monotonic() - began
        alone.append(server.unending(asked[1], max_tokens=lengths[1], never=never))
        together, overlapped = server.joined(
            asked[0], asked[1], lengths=lengths, after_s=took / _LONG, never=never
        )
        same = bench.same(list(zip(asked, alone, together, strict=True)))
        if not overlapped:
            raise RowFailure(
                f"the second, shorter answer came after the first: one was served after the other "
                f"({same})"
            )
        return Found(note=f"the second joined the first; {same}", metrics=same.metrics())

    return run


def _structured(bench: Bench) -> Found:
    wanted = {"name": "shape", "schema": _SCHEMA}
    reply = bench.server("mlx_vlm").chat(
        QUESTION,
        max_tokens=4 * TOKENS,
        response_format={"type": "json_schema", "json_schema": wanted},
    )
    try:
        data = json.loads(reply.text)
    except json.JSONDecodeError as error:
        raise RowFailure(f"no JSON: {reply.text!r} ({error})") from error
    colours = _SCHEMA["properties"]["colour"]["enum"]
    if set(data) != {"colour", "round"} or data["colour"] not in colours:
        raise RowFailure(f"not what the schema asks for: {reply.text}")
    return Found(note=f"{reply.text}, ended with {reply.finish}")


def _both(runtime: str) -> tuple[Row, ...]:
    """The rows that both servers have."""
    return (
        Row(
            name="server health",
            runtime=runtime,
            rule="/health answers that it is well, with this model where it names one",
            run=_health(runtime),
        ),
        Row(
            name="server chat",
            runtime=runtime,
            rule=f"/v1/chat/completions gives the Python call's greedy answer: {SAME}",
            run=_chat(runtime),
        ),
        Row(
            name="server streaming",
            runtime=runtime,
            rule="the streamed answer is the whole one, and ends with a reason, usage and [DONE]",
            run=_stream(runtime),
        ),
        Row(
            name="server, two at once",
            runtime=runtime,
            rule="a short question that comes while a long answer is written is answered before "
            f"that ends, and both as one at a time: {SAME}",
            run=_joined(runtime),
        ),
        Row(
            name="server, eight at once",
            runtime=runtime,
            rule=f"continuous batching against one at a time: {SAME}",
            run=_concurrent(runtime, 8),
        ),
    )


ROWS: Final = (
    *_both("mlx_vlm"),
    Row(
        name="server image",
        runtime="mlx_vlm",
        rule="a picture as a data URI gives the Python call's answer, another picture moves the "
        f"log-probabilities; {SAME}",
        run=_picture,
        needs=(needs.sees,),
    ),
    Row(
        name="structured output",
        runtime="mlx_vlm",
        rule="response_format json_schema gives JSON of that schema",
        run=_structured,
    ),
    *_both("mlx_lm"),
)
