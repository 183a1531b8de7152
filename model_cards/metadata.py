"""Card metadata: what the source's card states, and what a conversion of it may repeat.

The source's front matter is untrusted. No object is constructed from it: parser events are read,
and of them only the few keys below, each as text. So tags cannot make objects, aliases and merge
keys cannot expand, and the language code ``no`` stays "no" instead of becoming False.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from model_cards.markdown import hub_url, one_line

MAX_METADATA_CHARS = 1 << 20
"""Longest front matter that is parsed; cards with embedding benchmarks reach half of it."""

# The hub's own definition of the block, so that both see the same one.
_BLOCK = re.compile(r"\A\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
_MAX_DEPTH = 32
_NULLS = frozenset({"~", "null", "Null", "NULL"})
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LICENSE_FILE = re.compile(r"(?i)(?:licen[cs]e|copying|notice)(?:[._-].*)?")
_LANGUAGE = re.compile(r"(?i)[a-z]{2,3}(?:-[a-z0-9]{2,8}){0,3}|code|multilingual")
_DATASET = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)
_PIPELINE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+){0,8}")
_TAG = re.compile(r"[\w][\w .:/+#()&'-]{0,63}")
# What the hub's form for `license: other` accepts besides an address.
_LINKABLE_LICENSE_FILES = frozenset({"LICENSE", "LICENSE.md"})
# True of the source's files, its loader, its hosting or its benchmark table; not of a conversion.
_FALSE_TAG = re.compile(
    r"""
    transformers(\.js)? | pytorch | torch | safetensors | tf | tensorflow | jax | flax | rust | timm
    | onnx(runtime)? | openvino | core-?ml | tflite | litert | gguf | ggml | llama[.-]cpp | ollama
    | keras(-hub)? | diffusers | peft | q?lora | adapter | nemo | sentence[-_]transformers
    | vllm | sglang | tensorrt(-llm)? | text-generation-inference | text-embeddings-inference
    | exl[23] | exllamav[23] | (auto-?)?(awq|gptq|round) | bitsandbytes | bnb | hqq | modelopt
    | compressed-tensors | llm-?compressor | quanti[sz](ed|ation) | [1-8]-?bits? | 16-?bits?
    | (fp|bf|int|uint|nf|mxfp|nvfp|float|bfloat)(4|8|16|32)
    | autotrain_compatible | (inference_)?endpoints(_compatible)? | custom_code | has_space
    | generated_from_trainer | model-index | eval-results | leaderboard | mteb
    """,
    re.VERBOSE,
)
_DERIVED_PREFIXES = (
    "license:",
    "base_model:",
    "dataset:",
    "language:",
    "region:",
    "deploy:",
    "doi:",
    "library:",
    "diffusers:",
    "format:",
)


@dataclass(frozen=True, kw_only=True)
class SourceMetadata:
    """The facts of a source card that hold for a conversion too, as text and unvalidated."""

    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    problem: str | None = None
    """Why the metadata could not be read; None when it was, or when there is none."""


def read_source_metadata(card: str | None) -> SourceMetadata:
    """Read a README's front matter; a malformed one gives a ``problem`` and no facts."""
    match = _BLOCK.match((card or "").removeprefix("\ufeff"))
    if match is None:
        return SourceMetadata()
    block = match[1]
    if len(block) > MAX_METADATA_CHARS:
        return SourceMetadata(problem=f"it is longer than {MAX_METADATA_CHARS:,} characters")
    try:
        values = _top_level(block)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 2}" if mark is not None else ""
        return SourceMetadata(problem=f"it is not valid YAML{where}")
    except _Refused as error:
        return SourceMetadata(problem=str(error))
    return SourceMetadata(
        license=values.get("license", ()),
        license_name=_first(values, "license_name"),
        license_link=_first(values, "license_link"),
        language=values.get("language", ()),
        datasets=values.get("datasets", ()),
        tags=values.get("tags", ()),
        pipeline_tag=_first(values, "pipeline_tag"),
    )


def repeatable(card: str | None) -> str | None:
    """A card's front matter cut down to the facts that :func:`read_source_metadata` finds in it.

    None where it states none of them; short enough to be kept for cards that are written later.
    """
    found = asdict(read_source_metadata(card))
    facts = {key: value for key, value in found.items() if value and key != "problem"}
    lists = {key: list(value) for key, value in facts.items() if isinstance(value, tuple)}
    return dump_front_matter({**facts, **lists}) if facts else None


def card_metadata(
    source: SourceMetadata,
    *,
    base_model: str | None,
    base_revision: str | None,
    source_files: tuple[str, ...],
    pipeline_tag: str,
) -> dict[str, Any]:
    """The front matter of the conversion's card, in the order it is written.

    Evaluation results, widgets, gates and successors of the source are claims about the source and
    are not repeated.
    """
    data: dict[str, Any] = {"library_name": "mlx"}
    if base_model is not None:
        data["base_model"] = one_line(base_model)
        # The hub's model tree files every MLX conversion under "Quantizations", whatever its dtype;
        # its other relations (finetune, adapter, merge) would each be false.
        data["base_model_relation"] = "quantized"
    stated = source.pipeline_tag or ""
    data["pipeline_tag"] = stated if _PIPELINE.fullmatch(stated) else pipeline_tag
    data |= license_metadata(
        source, base_model=base_model, base_revision=base_revision, source_files=source_files
    )
    if language := _matching(source.language, _LANGUAGE):
        data["language"] = language
    if datasets := _matching(source.datasets, _DATASET):
        data["datasets"] = datasets
    data["tags"] = conversion_tags(source.tags)
    return data


def license_metadata(
    source: SourceMetadata,
    *,
    base_model: str | None,
    base_revision: str | None,
    source_files: tuple[str, ...],
) -> dict[str, Any]:
    """``license``, ``license_name``, ``license_link`` as stated; {} when none can be repeated."""
    ids = [text.strip().lower() for text in source.license]
    if not ids or not all(_LICENSE_ID.fullmatch(text) for text in ids):
        return {}
    data: dict[str, Any] = {"license": ids[0] if len(ids) == 1 else ids}
    if source.license_name:
        data["license_name"] = one_line(source.license_name, limit=200)
    address = license_address(
        source.license_link,
        base_model=base_model,
        base_revision=base_revision,
        source_files=source_files,
    )
    if address is not None:
        data["license_link"] = address
    return data


def license_address(
    stated: str | None,
    *,
    base_model: str | None,
    base_revision: str | None,
    source_files: tuple[str, ...],
) -> str | None:
    """The stated licence link as seen from the conversion's repo; None when it leads nowhere."""
    if not stated:
        return None
    if re.match(r"(?i)https?://[^\s<>\"'`]+\Z", stated):
        return stated
    path = stated.removeprefix("./")
    if path not in source_files:
        return None
    if path in _LINKABLE_LICENSE_FILES:
        return path
    if base_model is None:
        return None
    return hub_url(base_model, revision=base_revision, path=path)


def license_files(source_files: tuple[str, ...]) -> tuple[str, ...]:
    """The licence and notice files among ``source_files``, those at the root first."""
    found = [name for name in source_files if _LICENSE_FILE.fullmatch(PurePosixPath(name).name)]
    return tuple(sorted(found, key=lambda name: (name.count("/"), name)))


def conversion_tags(tags: tuple[str, ...]) -> list[str]:
    """``mlx``, then the source's tags that stay true: no formats, loaders, hosting or scores."""
    kept = ["mlx"]
    seen = {"mlx"}
    for tag in tags:
        low = tag.lower()
        if low in seen or _FALSE_TAG.fullmatch(low) or low.startswith(_DERIVED_PREFIXES):
            continue
        if _TAG.fullmatch(tag):
            seen.add(low)
            kept.append(tag)
    return kept


def dump_front_matter(data: dict[str, Any]) -> str:
    """``data`` as the YAML block that opens a README, both ``---`` lines included."""
    text = yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1 << 16
    )
    return f"---\n{text}---\n"


class _Refused(Exception):
    """YAML that a card has no reason to hold, or that states one thing twice."""


def _top_level(block: str) -> dict[str, tuple[str, ...]]:
    """The texts under each key of the root mapping: one scalar, or the scalars of one list.

    Reads parser events in one pass: composing nodes recurses in C and overflows its stack.
    """
    values: dict[str, list[str]] = {}
    inside: list[type[yaml.Event]] = []  # the collections that are open, outermost first
    key: str | None = None
    for event in yaml.parse(block, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("it uses YAML aliases")
        if isinstance(event, yaml.CollectionStartEvent):
            if not inside and not isinstance(event, yaml.MappingStartEvent):
                raise _Refused("it is not a mapping")
            if len(inside) == 1 and key is None:
                raise _Refused("one of its keys is not text")
            if len(inside) == _MAX_DEPTH:
                raise _Refused("it is nested too deeply")
            inside.append(type(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            inside.pop()
            if len(inside) == 1:
                key = None
        elif isinstance(event, yaml.ScalarEvent):
            if not inside and not _is_null(event):
                raise _Refused("it is not a mapping")
            if len(inside) == 1 and key is None:
                key = event.value
                if key in values:
                    raise _Refused(f"it states {one_line(key, limit=80)} twice")
                values[key] = []
            elif key is not None and inside[1:] in ([], [yaml.SequenceStartEvent]):
                if not _is_null(event):
                    values[key].append(event.value.strip())
                if len(inside) == 1:
                    key = None
    return {key: tuple(texts) for key, texts in values.items()}


def _is_null(event: yaml.ScalarEvent) -> bool:
    return not event.value.strip() or (event.style in (None, "") and event.value in _NULLS)


def _first(values: dict[str, tuple[str, ...]], key: str) -> str | None:
    found = values.get(key, ())
    return found[0] if found else None


def _matching(texts: tuple[str, ...], pattern: re.Pattern[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if pattern.fullmatch(text)]
