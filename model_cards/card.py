"""The model card of a converted checkpoint: facts in, README.md text out.

The front matter is always written here. The body comes from a Jinja2 template in a sandbox in
which every value is escaped for Markdown unless a filter says otherwise, so no text of the source,
its file names or its report can add markup. A template of the user replaces the body, or extends
``card.md.j2`` and replaces single blocks: summary, usage, parity, provenance, files, licence.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from model_cards.markdown import code, escape, fenced, hub_url, link, literal, shell
from model_cards.metadata import (
    SourceMetadata,
    card_metadata,
    dump_front_matter,
    license_files,
    read_source_metadata,
)
from model_cards.parity import parity_view
from model_cards.view import CardError, human_bytes, number, recipe_text

if TYPE_CHECKING:
    from jinja2 import TemplateSyntaxError
    from jinja2.environment import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_DEFAULT = _TEMPLATES / "card.md.j2"
_NOWHERE = "path/to/this/folder"
"""What a card tells to load where no repo is known."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card states; ``source_card`` and every name from the source are untrusted."""

    repo_id: str | None
    """Target repo, None before one is known."""
    base_model: str | None
    """Hub id of the source, None for a local folder."""
    base_revision: str | None
    """Commit of the source."""
    source_card: str | None
    """README.md of the source."""
    source_files: tuple[str, ...]
    """Paths in the source, to find its licence."""
    modalities: tuple[str, ...]
    """What the model reads: "text", "image", "video", "audio"."""
    pipeline_tag: str
    """Used when the source's card states none."""
    runtimes: tuple[str, ...]
    """Those that load the checkpoint: "mlx-vlm", "mlx-lm"."""
    quantization: str
    """In words; empty when the weights are not quantized."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    dtype: str
    size_bytes: int
    parameters: int
    bits_per_weight: float
    drops: tuple[tuple[str, str], ...] = ()
    """(tensor name pattern, reason)."""
    notes: tuple[str, ...] = ()
    command: str
    versions: Mapping[str, str]
    plan_hash: str
    parity: Mapping[str, Any] | None
    """Content of parity.json, None when nothing was validated."""
    charts: tuple[tuple[str, str], ...] = ()
    """(file beside the card, what it shows) of the report's pictures."""
    kv_cache: Mapping[str, Any] | None = None
    """The study of KV-cache schemes, None where there was none."""
    acceptance: Mapping[str, Any] | None = None
    """Content of acceptance.json, None where the stock programs were not run."""
    sentence_embedding: bool = False


def render_card(facts: CardFacts, *, template: Path | None = None) -> str:
    """The whole README.md; CardError for a faulty template or a report of another plan."""
    source = read_source_metadata(facts.source_card)
    metadata = card_metadata(
        source,
        base_model=facts.base_model,
        base_revision=facts.base_revision,
        source_files=facts.source_files,
        pipeline_tag=facts.pipeline_tag,
    )
    body = _render_body(_context(facts, source, metadata), template or _DEFAULT)
    return f"{dump_front_matter(metadata)}\n{body.strip()}\n"


def readdressed(card: str, *, old: str | None, new: str, base_model: str | None) -> str:
    """A card that was rendered for the repo ``old``, or for none, as one of the repo ``new``.

    Only its title and the places that name the repo change, whatever else was written into it.
    """
    title, address = _title(old, base_model), old or _NOWHERE
    heading = f"# {_title(new, base_model)}"
    card = re.sub(rf"(?m)^# {re.escape(title)}$", lambda _: heading, card, count=1)
    return _places(address).sub(lambda _: new, card)


def names(card: str, repo_id: str) -> bool:
    """Whether a card names the repo, as something to load or in a link to the hub."""
    return _places(repo_id).search(card) is not None


def _places(address: str) -> re.Pattern[str]:
    """Where a card names what to load: by itself, or in a link to the hub and to files there."""
    found, hub = re.escape(address), re.escape(hub_url(""))
    return re.compile(rf"(?:(?<![\w./-]){found}(?!/)|(?<={hub}){found})(?![\w-]|\.\w)")


def _title(repo_id: str | None, base_model: str | None) -> "Markup":
    """The heading, escaped."""
    name = repo_id or base_model
    return escape(name.rsplit("/", 1)[-1] if name else "MLX checkpoint")


def _context(
    facts: CardFacts, source: SourceMetadata, metadata: Mapping[str, Any]
) -> dict[str, object]:
    """What templates see: the facts, and what is derived from them."""
    base, revision = facts.base_model, facts.base_revision
    return {
        "facts": facts,
        "metadata": metadata,
        "title": _title(facts.repo_id, base),
        "model": facts.repo_id or _NOWHERE,
        "base_url": hub_url(base) if base else None,
        "commit_url": hub_url(base, revision=revision) if base and revision else None,
        "size": human_bytes(facts.size_bytes),
        "recipe": recipe_text(facts.recipe),
        "parity": parity_view(facts.parity, plan_hash=facts.plan_hash),
        "metadata_problem": source.problem,
        "licence": {
            "ids": _listed(metadata.get("license", [])),
            "name": metadata.get("license_name"),
            "link": metadata.get("license_link"),
            "stated": source.license,
            "files": [
                # A local folder's licence files come along; a hub source is linked at its commit.
                link(code(path), hub_url(base, revision=revision, path=path) if base else path)
                for path in license_files(facts.source_files)
            ],
        },
    }


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@cache
def _environment() -> "ImmutableSandboxedEnvironment":
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        # finalize escapes for Markdown; autoescape makes macros and filters keep its result.
        finalize=escape,
        autoescape=True,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": code,
        "fenced": fenced,
        "link": link,
        "literal": literal,
        "number": number,
        "shell": shell,
    }
    return environment


def load_template(path: Path) -> "Template":
    """The template in ``path``; CardError with its line where it does not parse."""
    from jinja2 import TemplateSyntaxError
    from jinja2.environment import Template

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CardError(f"{path}: cannot read the card template: {reason}.") from error
    environment = _environment()
    try:
        compiled = environment.compile(text, name=str(path), filename=str(path))
    except TemplateSyntaxError as error:
        raise _unparsed(error, path) from error
    return Template.from_code(environment, compiled, environment.make_globals(None))


def _unparsed(error: "TemplateSyntaxError", path: Path) -> CardError:
    where = f"{error.filename or path}, line {error.lineno}"
    return CardError(f"{where}: the card template does not parse: {error.message}.")


def _render_body(context: Mapping[str, object], path: Path) -> str:
    """Render ``path``; whatever goes wrong in it is a CardError with its file and line."""
    from jinja2 import TemplateSyntaxError

    template = load_template(path)
    try:
        return template.render(context)
    except TemplateSyntaxError as error:  # of a template that this one includes
        raise _unparsed(error, path) from error
    except Exception as error:  # whatever the expressions of a template raise
        where = _position(path, error.__traceback__)
        raise CardError(f"{where}: the card template failed: {error}.") from error


def _position(path: Path, traceback: TracebackType | None) -> str:
    """ "FILE, line N" of the template line that was executing deepest, as Jinja2 maps it."""
    where = f"{path}, line 1"
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if name == str(path) or Path(name).parent == _TEMPLATES:
            where = f"{name}, line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where
