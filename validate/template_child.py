"""Runs in a child process of its own: does a chat template end, and in how much text?

Run by its path through ``validate.child``, so only the standard library and jinja2 are imported.
The environment is set up as transformers sets up its own: sandboxed, with loop controls and the
same names. What a template refuses to render is no matter here; only what it uses up is.
"""

import json
from datetime import datetime
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with the templates, if anything."""
    return {"problem": problem(request)}


def problem(request: dict[str, Any]) -> str | None:
    """What a template uses too much of, None where every conversation can be rendered."""
    made = environment()
    for name, text in request["templates"].items():
        for messages in request["conversations"]:
            for start in (True, False):
                try:
                    length = rendered(
                        made, text, messages, start=start, longest=request["characters"]
                    )
                except MemoryError:
                    return f"{name}: takes more than {request['memory'] >> 20} MiB of memory"
                except Exception:  # a template may refuse a conversation; that is another matter
                    continue
                if length > request["characters"]:
                    return f"{name}: makes more than {request['characters']:,} characters"
    return None


def rendered(made: Any, text: str, messages: list[Any], *, start: bool, longest: int) -> int:
    """Characters that a template makes of a conversation, counted no further than ``longest``."""
    template = made.from_string(text)
    length = 0
    kinds = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    tokens = {f"{kind}_token": f"<{kind}>" for kind in kinds}
    for piece in template.generate(
        messages=messages, add_generation_prompt=start, tools=None, documents=None, **tokens
    ):
        length += len(piece)
        if length > longest:
            break
    return length


def written(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> Any:
    """A sandbox with what chat templates rely on."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, which marks what the assistant said."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """The block's own statements."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = written
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda shape: datetime.now().strftime(shape)
    return made
