"""Chat templates are programs that a release brings: tried in a limited child before they are used.

transformers and the runtimes render them in their own process, sandboxed but without limits, so an
endless loop would hang a proof and a string of a gigabyte would end it. A template that renders the
same conversations in a child within limits does so here, too.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from validate import template_child
from validate.cases import MEDIA_FILES, TEXT_FILES, VIDEO_FILE, load_cases, media_question
from validate.child import ChildError, ask

SECONDS: Final = 20
"""Of processor time for all conversations; real templates take milliseconds."""
MEMORY: Final = 1 << 30
CHARACTERS: Final = 1_000_000
MAX_BYTES: Final = 16 << 20
"""Of a file that holds a template."""
_HOLDERS: Final = ("tokenizer_config.json", "processor_config.json", "chat_template.json")
_PATIENCE_S: Final = 60
"""On a busy machine a second of processor time takes long, and on some nothing limits that time."""


def template_problem(folder: Path, *, seconds: int = SECONDS) -> str | None:
    """Why the chat templates in ``folder`` must not be rendered here; None for sound ones."""
    found, too_long = _templates(folder)
    if too_long or not found:
        return too_long
    request = {
        "templates": found,
        "conversations": _conversations(),
        "memory": MEMORY,
        "characters": CHARACTERS,
    }
    return _tried(json.dumps(request), ascii(", ".join(found))[1:-1][:80], seconds)


@lru_cache(maxsize=64)
def _tried(request: str, names: str, seconds: int) -> str | None:
    """What the child says; the same templates are not tried twice, as both folders have them."""
    try:
        problem = ask(
            template_child.__file__,
            json.loads(request),
            memory=MEMORY,
            seconds=seconds,
            patience=_PATIENCE_S,
            file_bytes=1 << 20,
        )["problem"]
    except ChildError as error:
        if error.kind == "time":
            return f"{names}: does not end within {seconds + _PATIENCE_S} seconds"
        if error.kind == "signal":
            return f"{names}: does not end within {seconds} seconds of processor time"
        return f"{names}: cannot be tried: {ascii(str(error))[:300]}"
    return None if problem is None else str(problem)


def _conversations() -> list[Any]:
    """What a proof asks: nothing else is rendered with the release's template."""
    spoken = [case.conversation() for case in load_cases(*TEXT_FILES) if case.messages]
    return spoken + [media_question(case) for case in load_cases(*MEDIA_FILES.values(), VIDEO_FILE)]


def _templates(folder: Path) -> tuple[dict[str, str], str | None]:
    """Every template by where it is kept, and what is wrong with a file that may hold one."""
    found: dict[str, str] = {}
    files = [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    for path in sorted([*files, *(folder / name for name in _HOLDERS)]):
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_BYTES:
            return {}, f"{path.name}: has {path.stat().st_size} bytes, too many for a template"
        text = path.read_text(encoding="utf-8", errors="replace")
        name = str(path.relative_to(folder))
        if path.suffix == ".jinja":
            found[name] = text
        else:
            found |= {f"{name} {key}".strip(): one for key, one in _held(text)}
    return found, None


def _held(text: str) -> list[tuple[str, str]]:
    """The templates in a JSON file: one, or several with names."""
    try:
        held = json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    if isinstance(held, str):
        return [("", held)]
    entries = held if isinstance(held, list) else []
    pairs = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)]
    return [(str(name), one) for name, one in pairs if isinstance(one, str)]
