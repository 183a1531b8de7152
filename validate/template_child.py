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
    for name, text in request["templates"].items():
        for messages in request["conversations"]:
            for start in (True, False):
                try:
                    length = rendered(text, messages, start=start, longest=request["characters"])
                except MemoryError:
                    return f"{name}: takes more than {request['memory'] >> 20} MiB of memory"
                except Exception:  # a template may refuse a conversation; that is another matter
                    continue
                if length > request["characters"]:
                    return f"{name}: makes more than {request['characters']:,} characters"
    return None


def rendered(text: str, messages: list[Any], *, start: bool, longest: int) -> int:
    """Characters that a template makes of a conversation, counted no further than ``longest``."""
    template = environment().from_string(text)
    length = 0
    tokens = {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")}
    for piece in template.generate(
        messages=messages, add_generation_prompt=start, tools=None, documents=None, **tokens
    ):
        length += len(piece)
        if length > longest:
            break
    return length


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
    made.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda shape: datetime.now().strftime(shape)
    return made
