"""``--map runtime``: the work of a stock runtime's own loader, as a map for one release.

The loader is run on the release's headers (``validate.trace``), and what it does to each tensor
becomes a rule; from there on the conversion is planned, streamed and checked like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Expr, sources
from arch_maps.registry import ArchMap
from arch_maps.rules import Drop, Kind, Layout, Mount, Part, Rule
from converter.errors import PlanError
from converter.plan.build import prequantized
from converter.plan.model import Plan
from converter.source import Source

if TYPE_CHECKING:  # tracing brings the runtimes along, and most conversions do without
    from validate.trace import Headers, Parameter, Traced

HEAD: Final = "lm_head"
_LANGUAGE: Final = "language_model"
_SHOWN: Final = 10
_GENERATOR: Final = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration")
"""Classes whose output is logits of tokens."""
_ROUTERS: Final = frozenset({"gate", "router", "router_proj", "gate_linear", "shared_expert_gate"})
"""What runtimes call the projection that chooses experts."""
_TOWERS: Final[tuple[tuple[str, Part], ...]] = (
    ("audio", "audio"),
    ("speech", "audio"),
    ("proj", "projector"),
    ("vision", "vision"),
    ("visual", "vision"),
    ("image", "vision"),
    ("sam_model", "vision"),
)
"""Words in the first name of a path outside the language model; without one it is a projector."""


@dataclass(frozen=True, slots=True)
class Loader:
    """One runtime's loader on one release."""

    traced: Traced
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]
    read_by: tuple[str, ...]
    """Runtimes that load what these rules write, as it is written; first the one traced."""


def runtime_map(source: Source, *, model_file: Path | None = None) -> ArchMap:
    """The map that a stock runtime's loader amounts to; PlanError where there is none.

    Of the runtimes that take the release, the one is chosen whose layout most of them read.
    ``model_file`` is model code that the loaders take in the place of their own.
    """
    loader = trace_release(source, model_file=model_file)
    traced = loader.traced
    rules, drops = loader.rules, loader.drops
    tied = _tied(source.config, rules, drops)

    def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
        del facts, layout
        root.out.rules += rules
        root.out.drops += drops
        root.out.tied |= tied

    distributions = tuple(name.replace("_", "-") for name in loader.read_by)
    text = f"made by the loader of {traced.title} (--map runtime), not by a reviewed map"
    return ArchMap(
        model_type=str(source.config["model_type"]),
        tensors=tensors,
        config=_noting(text),
        layouts=(Layout("runtime", {}),),
        runtimes=distributions,
        parts=(traced.title,),
        **described(rules),
        origin={"by": "runtime", "runtime": traced.runtime, "version": traced.version},
    )


def described(rules: Sequence[Rule]) -> dict[str, Any]:
    """``modalities`` and ``pipeline_tag`` of a model with these parts."""
    parts = {rule.part for rule in rules}
    seen = ["image"] if "vision" in parts else []
    heard = ["audio"] if "audio" in parts else []
    return {
        "modalities": ("text", *seen, *heard),
        "pipeline_tag": "image-text-to-text" if seen else "text-generation",
    }


def trace_release(source: Source, *, model_file: Path | None = None) -> Loader:
    """The loader whose rules ``runtime_map`` takes; PlanError with every runtime's refusal."""
    from validate.runtime import RuntimeRefusal, runtimes_for
    from validate.trace import trace_loader

    if problems := prequantized(source):
        raise PlanError(problems)
    config = runtime_config(dict(source.config), Facts(source.config))
    place = None
    if model_file is not None:
        config["model_file"], place = model_file.name, model_file.parent
    names = runtimes_for(config, place)
    refused = []
    found = []
    for name in names:
        try:
            traced = trace_loader(config, headers_of(source), runtime=name, model_file=model_file)
        except RuntimeRefusal as refusal:
            refused.append(str(refusal))
            continue
        problems = traced.problems()
        if problems:
            refused += problems
            continue
        found.append(_judged(source, config, traced, names, refused, model_file))
    usable = [loader for loader in found if loader.read_by]
    if usable:
        multimodal = [loader for loader in usable if _multimodal(loader)]
        return max(multimodal or usable, key=lambda loader: len(loader.read_by))
    if not names:
        model_type = source.config.get("model_type")
        refused = [f"config.json: no stock runtime has a model for model_type {model_type!r}"]
    raise PlanError([f"--map runtime: {line}" for line in dict.fromkeys(refused)])


def check_reload(
    plan: Plan, runtimes: Sequence[str], *, model_file: Path | None = None
) -> tuple[str, ...]:
    """Prove from headers that ``runtimes`` load the output as it is written; PlanError.

    Names and versions of the runtimes are returned. mlx-lm may leave other parts than text alone.
    """
    from importlib.metadata import version

    from validate.trace import reload_problems

    sees = any(out.rule.part != "text" for out in plan.outputs)
    problems = []
    for name in runtimes:
        found = reload_problems(
            plan.config,
            {t.name: (t.dtype, t.shape) for shard in plan.shards for t in shard.tensors},
            runtime=name.replace("-", "_"),
            text_only=sees and name == "mlx-lm",
            model_file=model_file,
            alike=_alike(plan),
        )
        problems += [f"weights would not be loaded as they are written: {p}" for p in found]
    if problems:
        shown = problems[:_SHOWN]
        more = len(problems) - len(shown)
        raise PlanError([*shown, *([f"and {more} more like these"] if more else [])])
    return tuple(f"{name} {version(name)}" for name in runtimes)


def _alike(plan: Plan) -> dict[str, str]:
    """Tensors that hold the same bytes as another one: a table that is stored as the head too."""
    first: dict[Any, str] = {}
    same = {}
    for out in plan.outputs:
        for role, tensor in out.stored.items():
            key = (out.expr, out.dtype, out.quant, role)
            same[tensor.name] = first.setdefault(key, tensor.name)
    twice = {kept for name, kept in same.items() if name != kept}
    return {name: kept for name, kept in same.items() if kept in twice}


def headers_of(source: Source) -> Headers:
    """Dtype code and shape of every tensor of a release."""
    return {name: (info.dtype, info.shape) for name, info in source.tensors.items()}


def runtime_config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """The release's own config with its position settings in every spelling, nothing else."""
    out = spell.start(config)
    _spell_positions(out, facts)
    for name, section in config.items():
        if isinstance(section, Mapping) and name.endswith("_config"):
            _spell_positions(out[name], facts.section(name))
    return out


def kind_of(path: str, parameter: Parameter, *, vocab: int | None) -> Kind:
    """What a parameter is, by the module that owns it and by its name."""
    module, _, leaf = path.rpartition(".")
    owner, last = parameter.module, module.rpartition(".")[2]
    if leaf == "bias" or leaf.endswith("_bias"):
        return Kind.BIAS if leaf == "bias" else Kind.STATE
    if "Norm" in owner:
        return Kind.NORM
    if owner.startswith("Conv"):
        return Kind.CONV
    if leaf != "weight":
        return Kind.POSITION if "pos" in leaf or "embed" in leaf else Kind.STATE
    if not parameter.quantizable:
        routes = _ROUTERS & set(module.split("."))
        return Kind.GATE if routes else Kind.POSITION
    if "Embedding" in owner:
        return Kind.POSITION if "pos" in last else Kind.EMBEDDING
    if _ROUTERS & set(module.split(".")[-2:]):
        return Kind.GATE
    heads = last == HEAD or (vocab is not None and parameter.value.shape[0] == vocab)
    return Kind.HEAD if heads else Kind.LINEAR


def part_of(path: str, *, multimodal: bool) -> Part:
    """Which part of a model a parameter belongs to: mlx-vlm keeps text under one module."""
    top = path.partition(".")[0]
    if not multimodal or top in (_LANGUAGE, HEAD):
        return "text"
    return next((part for word, part in _TOWERS if word in top), "projector")


def _judged(
    source: Source,
    config: dict[str, Any],
    traced: Traced,
    names: tuple[str, ...],
    refused: list[str],
    model_file: Path | None,
) -> Loader:
    from validate.trace import reload_problems

    rules = rules_of(source, traced)
    written = {
        rule.target: (_written_as(source, rule.expr), tuple(map(int, rule.expr.shape)))
        for rule in rules
    }
    ordered = (traced.runtime, *(name for name in names if name != traced.runtime))
    read_by = []
    first: dict[Expr, str] = {}
    same = {rule.target: first.setdefault(rule.expr, rule.target) for rule in rules}
    alike = {n: kept for n, kept in same.items() if list(same.values()).count(kept) > 1}
    for name in ordered:
        problems = reload_problems(
            config, written, runtime=name, model_file=model_file, alike=alike
        )
        if not problems:
            read_by.append(name)
        elif name == traced.runtime:
            refused += problems[:3]
            break
    return Loader(traced, rules, _drops(source, traced, rules), tuple(read_by))


def rules_of(source: Source, traced: Traced) -> tuple[Rule, ...]:
    """The loader's work as rules, with the kind and part of every parameter."""
    vocab = _vocab(source.config)
    tops = {path.partition(".")[0] for path in traced.parameters}
    multimodal = (
        traced.runtime == "mlx_vlm" and _LANGUAGE in tops and bool(tops - {_LANGUAGE, HEAD})
    )
    rules = []
    for path, parameter in traced.parameters.items():
        part = part_of(path, multimodal=multimodal)
        kind = kind_of(path, parameter, vocab=vocab)
        rules.append(Rule(path, _expr(parameter), kind, part))
    return tuple(rules)


def _expr(parameter: Parameter) -> Expr:
    from validate.lowering import Opaque

    assert not isinstance(parameter.value, Opaque)
    return parameter.value


def _drops(source: Source, traced: Traced, rules: tuple[Rule, ...]) -> tuple[Drop, ...]:
    tables = [
        rule.expr.name
        for rule in rules
        if rule.kind is Kind.EMBEDDING
        and len(sources(rule.expr)) == 1
        and hasattr(rule.expr, "name")
    ]
    drops = []
    for name in traced.unused:
        shape = source.tensors[name].shape
        tied = next((t for t in tables if source.tensors[t].shape == shape), None)
        if tied is not None and name.endswith(f"{HEAD}.weight"):
            reason = "tied to the input embedding; the runtime reuses that table"
            drops.append(Drop(name, reason, shape, same_as=tied))
        else:
            drops.append(Drop(name, f"the loader of {traced.title} leaves it out", shape))
    return tuple(drops)


def _tied(
    config: Mapping[str, Any], rules: Sequence[Rule], drops: Sequence[Drop]
) -> frozenset[str]:
    """The tensor of the table that also makes the logits: of a generator without a head's rule."""
    architectures = " ".join(map(str, config.get("architectures") or ()))
    if any(rule.kind is Kind.HEAD for rule in rules) or not _GENERATOR.search(architectures):
        return frozenset()
    if stored := {drop.same_as for drop in drops if drop.same_as is not None}:
        return frozenset(stored)
    vocab = _vocab(config)
    tables = (
        {leaf.name for leaf in sources(rule.expr)}
        for rule in rules
        if rule.kind is Kind.EMBEDDING and vocab in (None, rule.expr.shape[0])
    )
    return frozenset(next(tables, set()))


def _multimodal(loader: Loader) -> bool:
    return any(rule.part != "text" for rule in loader.rules)


def _written_as(source: Source, expr: Expr) -> str:
    codes = {source.tensors[leaf.name].dtype for leaf in sources(expr)}
    return codes.pop() if len(codes) == 1 else "F32"


def _vocab(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, Mapping) else {}):
        if isinstance(section.get("vocab_size"), int):
            return int(section["vocab_size"])
    return None


def _noting(text: str) -> Any:
    def config(given: dict[str, Any], facts: Facts) -> dict[str, Any]:
        facts.note(text)
        return runtime_config(given, facts)

    return config


def _spell_positions(out: dict[str, Any], facts: Facts) -> None:
    stated = facts.data.get("rope_parameters") or facts.data.get("rope_scaling") or {}
    by_layer_type = any(isinstance(value, Mapping) for value in dict(stated).values())
    if by_layer_type or not (stated or "rope_theta" in facts.data):
        return
    out.update(spell.spell_rope(spell.rope(facts)))
