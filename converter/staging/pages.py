"""Two pages for people: what is staged, and what one repository holds. Everything is escaped."""

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from urllib.parse import quote

from converter.staging.card import split_front_matter
from converter.staging.repos import Commit, RepoMeta

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.35rem } h1 a { text-decoration: none }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--dim); font-weight: 500 }
td, th { padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.size, th.size { text-align: right; white-space: nowrap }
code, pre { font: 13px/1.5 ui-monospace, monospace } pre { overflow-x: auto }
.dim { color: var(--dim) } article { border: 1px solid var(--line); padding: .2rem 1.2rem;
margin-top: 2rem; border-radius: 8px } .tag { border: 1px solid var(--line); border-radius: 9px;
padding: 0 .5rem; margin-right: .3rem; font-size: 13px; white-space: nowrap }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def human_size(size: int) -> str:
    """A number of bytes in the unit a person would use."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} TB"


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{body}</body></html>"
    )


def _marks(meta: RepoMeta) -> str:
    marks = [name for name, on in (("private", meta.private), ("gated", meta.gated)) if on]
    return "".join(f'<span class="tag">{mark}</span>' for mark in marks)


def index_page(repos: Iterable[tuple[RepoMeta, Commit]]) -> str:
    """Every repository the visitor may see, the latest first."""
    rows = "".join(
        f'<tr><td><a href="/{quote(meta.id)}">{escape(meta.id)}</a> {_marks(meta)}</td>'
        f'<td class="size">{len(commit.files)}</td>'
        f'<td class="size">{human_size(sum(e.size for e in commit.files.values()))}</td>'
        f'<td class="dim">{escape(commit.date)}</td></tr>'
        for meta, commit in sorted(repos, key=lambda pair: pair[1].date, reverse=True)
    )
    table = (
        f'<table><tr><th>repository</th><th class="size">files</th><th class="size">size</th>'
        f"<th>last commit</th></tr>{rows}</table>"
    )
    nothing = '<p class="dim">Nothing is staged yet.</p>'
    return _page("Staging hub", f"<h1>Staging hub</h1>{table if rows else nothing}")


def repo_page(
    meta: RepoMeta, commit: Commit, *, readme: str | None, history: Iterable[Commit]
) -> str:
    """One repository at one commit: its files, its card, its latest commits."""
    base = f"/{quote(meta.id)}"
    rows = "".join(
        f'<tr><td><a href="{base}/resolve/{commit.oid}/{quote(entry.path)}">'
        f'{escape(entry.path)}</a></td><td class="size">{human_size(entry.size)}</td>'
        f'<td class="dim"><code>{entry.sha256[:16]}</code></td></tr>'
        for entry in commit.files.values()
    )
    commits = "".join(
        f'<li><a href="{base}/tree/{c.oid}"><code>{c.oid[:8]}</code></a> {escape(c.title)} '
        f'<span class="dim">{escape(c.author)}, {escape(c.date)}</span></li>'
        for c in history
    )
    card = f"<article>{render_card(readme)}</article>" if readme is not None else ""
    return _page(
        meta.id,
        f'<h1><a href="/">Staging hub</a> / {escape(meta.id)} {_marks(meta)}</h1>'
        f'<p class="dim">commit <code>{commit.oid}</code>, {escape(commit.date)}</p>'
        f'<table><tr><th>file</th><th class="size">size</th><th>sha256</th></tr>{rows}</table>'
        f"{card}<h2>Commits</h2><ul>{commits}</ul>",
    )


def render_card(readme: str) -> str:
    """A model card as HTML: its front matter verbatim, its Markdown without raw HTML or images."""
    from markdown_it import MarkdownIt

    front_matter, text = split_front_matter(readme)
    # The "js-default" preset escapes raw HTML and rejects script URLs.
    markdown = MarkdownIt("js-default").disable("image")
    head = f"<pre>{escape(front_matter)}</pre>" if front_matter else ""
    return head + str(markdown.render(text))
