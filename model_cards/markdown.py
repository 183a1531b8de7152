"""Untrusted text made inert: escaping for Markdown prose, code spans, fences, shell and Python."""

import json
import re
import shlex
from urllib.parse import quote

from markupsafe import Markup

_HUB = "https://huggingface.co"
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;"}
_INLINE = re.compile(r"[&<>|\\]|[`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])")
_NEEDS_ENTITIES = re.compile(r"[`|\\<>&]")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def one_line(value: object, *, limit: int | None = None) -> str:
    """``value`` as one line of printable text; longer than ``limit`` characters ends in "…"."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        return text[: limit - 1] + "…"
    return text


def escape(value: object) -> Markup:
    """``value`` as Markdown prose on one line in which no Markdown and no HTML is active."""
    if isinstance(value, Markup):
        return value
    text = _INLINE.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), one_line(value, limit=2000))
    # A list number, heading or rule is only special at the start of a line; values may stand there.
    if match := re.match(r"\d{1,9}(?=[.)](?:\s|$))|(?=[-#+=])", text):
        text = text[: match.end()] + "\\" + text[match.end() :]
    return Markup(text)


def code(value: object) -> Markup:
    """``value`` as a code span, also inside a table cell; empty text gives nothing."""
    text = one_line(value, limit=500)
    if not text:
        return Markup("")
    if not _NEEDS_ENTITIES.search(text):
        return Markup(f"`{text}`")
    # Entities are never markup, so pipes and backticks need no rules of precedence.
    return Markup("<code>" + _PUNCTUATION.sub(lambda m: f"&#{ord(m[0])};", text) + "</code>")


def fenced(value: object, language: str = "") -> Markup:
    """``value`` as a fenced block of one line that it cannot close."""
    text = one_line(value)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def shell(value: object) -> Markup:
    """``value`` as one POSIX shell word, for use inside a fenced block."""
    return Markup(shlex.quote(one_line(value)))


def literal(value: object) -> Markup:
    """``value`` as a double-quoted Python and JSON string, for use inside a fenced block."""
    return Markup(json.dumps(one_line(value), ensure_ascii=False))


def link(label: object, url: str) -> Markup:
    """A Markdown link; ``url`` must be http(s) or a relative path, else only the label is left."""
    text = label if isinstance(label, Markup) else escape(label)
    target = safe_url(url)
    return Markup(f"[{text}]({target})") if target else Markup(text)


def safe_url(url: str) -> str | None:
    """``url`` percent-encoded for a Markdown target; None for a scheme other than http(s)."""
    flat = one_line(url)
    if not flat.lower().startswith(("http://", "https://")) and (
        ":" in flat or flat.startswith(("/", "\\"))
    ):
        return None
    return quote(flat, safe="/:?#=&%+,;@~.-_") or None


def hub_url(repo: str, *, revision: str | None = None, path: str | None = None) -> str:
    """Hub address of a model, of its tree at ``revision``, or of the file ``path`` there."""
    address = f"{_HUB}/{quote(one_line(repo), safe='/')}"
    if path is not None:
        return f"{address}/blob/{quote(revision or 'main', safe='')}/{quote(path, safe='/')}"
    return f"{address}/tree/{quote(revision, safe='')}" if revision else address
