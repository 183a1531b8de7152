"""Building a plan: map, recipe and headers in, every output byte's place out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, Final

from arch_maps.config import spell_dtype, stored_dtype
from arch_maps.dtypes import FLOAT_CODES, TORCH_NAMES, itemsize
from arch_maps.facts import Facts
from arch_maps.ops import Affine, Expr, children, describe, element_count, plain, sources
from arch_maps.ops import Source as Leaf
from arch_maps.rules import Kind, Rule
from converter.config_errors import config_errors
from converter.decode import View, quantization_settings
from converter.errors import PlanError, UsageError
from converter.plan import rotate
from converter.plan.calibrated import calibrated_spec, unseen_pictures
from converter.plan.layout import lay_out
from converter.plan.match import Match
from converter.plan.model import Output, Plan, StoredTensor
from converter.plan.options import Options
from converter.plan.repack import Repack, repack
from converter.source import Source
from converter.source.header import paused_gc
from converter.version import program_version
from quant.recipe import AFFINE_GROUP_SIZES, QuantSpec

_CODES_TO_TORCH = {code: name for name, code in TORCH_NAMES.items()}
_INTEGERS: Final = {Kind.INDEX: "integers", Kind.HASH: "integers of 64 bits"}
_RENAMED = "model.language_model."


@paused_gc()
def build_plan(
    source: Source,
    match: Match,
    options: Options,
    *,
    origin: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    view: View | None = None,
) -> Plan:
    """The plan of converting a matched release; raises PlanError with every problem.

    ``origin`` is what is known of the release's identity beyond its headers (repo, commit);
    ``view`` is the decoded release that ``source`` is, where it had a quantization of its own.
    """
    facts = Facts(source.config)
    with config_errors(f"the map for {match.arch.model_type}"):
        config = match.arch.config(dict(source.config), facts)
    config.pop("kv_cache_quantization", None)  # which is of the checkpoint that it was measured on
    problems = list(facts.problems) + prequantized(source)
    dtype = options.dtype or stored_dtype(source.config)
    if dtype is not None and dtype not in TORCH_NAMES:
        problems.append(f"config.json: dtype {dtype!r} is not one that MLX can store")
    if options.calibration is not None:
        problems += unseen_pictures(options.calibration, match.arch)
    if problems:
        raise PlanError(problems)
    spec_for = _quantization(source, match, options)
    view = View(source=source) if view is None else replace(view, source=source)
    rules, turned = match.rules, ""
    if options.rotate_values:
        rules, turned = rotate.values(match.rules, match.values)
    outputs, notes = _outputs(view, rules, dtype, spec_for, problems, options)
    if problems:
        raise PlanError(problems)
    if options.quant is not None and all(out.quant is None for out in outputs):
        raise PlanError(["-q: no tensor of this release can be quantized with this recipe"])
    used = main_dtype(outputs)
    spell_dtype(config, used)
    base = options.quant or _usual_spec(outputs)
    if base is not None:
        config["quantization"] = _quantization_config(base, outputs)
        config["quantization_config"] = config["quantization"]
    return assemble(
        source,
        outputs,
        model_type=match.arch.model_type,
        layout=match.layout.name,
        drops=(*match.drops, *view.drops),
        options=options,
        config=config,
        notes=(*source.notes, *match.notes, *facts.notes, *notes, *([turned] if turned else [])),
        origin=origin,
        metadata={"format": "mlx"},
        shard_bytes=shard_bytes,
        map=match.arch.record(),
        decoding=_decoding(view),
    )


def assemble(
    source: Source,
    outputs: Sequence[Output],
    *,
    model_type: str,
    layout: str,
    drops: Sequence[Any],
    options: Options,
    config: dict[str, Any],
    notes: Sequence[str],
    origin: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    shard_bytes: int | None = None,
    map: dict[str, Any] | None = None,
    decoding: dict[str, Any] | None = None,
) -> Plan:
    """Give every output's pending tensors their places and freeze the plan."""
    tensors = [tensor for out in outputs for tensor in out.stored.values()]
    sizing = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    shards = lay_out(tensors, metadata=metadata, **sizing)
    places = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    assert len(places) == len(tensors), "two parameters are stored under one name"
    parameters = 0
    read: set[str] = set()
    for out in outputs:  # in place: a second copy of each would take a third longer
        stored, expr = out.stored, out.rule.expr
        for role, tensor in stored.items():
            stored[role] = places[tensor.name]
        parameters += element_count(expr.shape)
        if isinstance(expr, Leaf):
            read.add(expr.name)
        else:
            read.update(leaf.name for leaf in sources(expr))
    return Plan(
        version=program_version(),
        model_type=model_type,
        layout=layout,
        options=options,
        source=identity(source, origin),
        config=config,
        outputs=tuple(outputs),
        drops=tuple(drops),
        shards=shards,
        notes=tuple(dict.fromkeys(notes)),
        map=map,
        decoding=decoding,
        parameters=parameters,
        source_bytes=_bytes_of(source, read),
    )


def _bytes_of(source: Source, read: Set[str]) -> int:
    """Bytes of the tensors ``read``, nearly all of a release: looking each up takes longer."""
    every = source.tensors
    left = every.keys() - read if len(read) < len(every) else ()
    return sum([stop - start for *_, start, stop in every.values()]) - sum(
        every[name].nbytes for name in left
    )


def identity(source: Source, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the plan records of its source: origin, config digest, header digests and sizes."""
    text = json.dumps(source.config, sort_keys=True)
    return {
        **(origin or {}),
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "files": {name: list(pair) for name, pair in sorted(source.fingerprint().items())},
    }


def pending_tensors(
    target: str, shape: tuple[int, ...], dtype: str, quant: QuantSpec | None
) -> dict[str, StoredTensor]:
    """The tensors that store one parameter, by role; they have no places yet."""
    if quant is None:
        dims, size = _plain_tensor(dtype, shape)
        return {"": StoredTensor(target, dtype, dims, "", 0, size)}
    module = target.removesuffix(".weight")
    return {
        role: StoredTensor(f"{module}.{role}", code, dims, "", 0, size)
        for role, code, dims, size in _quantized_tensors(quant, shape, dtype)
    }


@lru_cache(maxsize=1024)  # layers repeat each other
def _plain_tensor(dtype: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return plain(shape), element_count(shape) * itemsize(dtype)


@lru_cache(maxsize=1024)
def _quantized_tensors(
    quant: QuantSpec, shape: tuple[int, ...], dtype: str
) -> tuple[tuple[str, str, tuple[int, ...], int], ...]:
    tensors = quant.output_tensors(plain(shape), dtype).items()
    return tuple((role, code, *_plain_tensor(code, dims)) for role, (code, dims) in tensors)


def _outputs(
    view: View,
    rules: Sequence[Rule],
    dtype: str | None,
    spec_for: Callable[[Rule], QuantSpec | None],
    problems: list[str],
    options: Options,
) -> tuple[list[Output], list[str]]:
    outputs = []
    notes: list[str] = []
    rounded = scaled = 0
    uncalibrated: Counter[str] = Counter()
    every = {info.dtype for info in view.source.tensors.values()}
    only = frozenset(every) if len(every) == 1 else None  # then none needs to be looked up
    for rule in rules:
        code, problem = _storage_dtype(view.source, rule, dtype, only=only)
        if problem:
            problems.append(problem)
            continue
        spec, kept = spec_for(rule), ""
        if spec is not None and int(rule.expr.shape[-1]) % spec.group_size:
            kept = f"rows of {int(rule.expr.shape[-1])} do not divide into {spec.group_size}"
            spec = _narrow(rule, spec)
            kept = "" if spec is not None else kept
        own = _own_codes(view, rule, spec, code, options) if view.coded else ""
        if isinstance(own, Repack):
            spec, kept = own.spec, ""
        if spec is not None and not isinstance(own, Repack):
            spec, why = calibrated_spec(rule, spec)
            uncalibrated.update([why] if why else [])
        if code in ("BF16", "F16") and not isinstance(rule.expr, Leaf):
            folds = list(_folds(rule.expr))
            rounded += any(fold.offset for fold in folds)
            scaled += any(fold.scale != 1.0 for fold in folds)
        parts = own.parts if isinstance(own, Repack) else None
        stored = pending_tensors(rule.target, rule.expr.shape, code, spec)
        origin = _origin(view, rule, own, spec) if view.coded else ""
        outputs.append(Output(rule, code, spec, stored, kept, parts, origin))
    if rounded:
        notes.append(
            f"{rounded} norm weights are stored as 1 + weight and round to the storage dtype "
            "once more; the parity report runs the reference on the stored values"
        )
    if scaled:
        notes.append(
            f"{scaled} weights hold multipliers of the release and round to the storage dtype once "
            "more; the parity report runs the reference on the stored values"
        )
    origins = Counter(out.origin for out in outputs if out.origin)
    notes += [f"{count} weights {origin}" for origin, count in sorted(origins.items())]
    notes += [
        f"{count} {why}: method search, without activations" for why, count in uncalibrated.items()
    ]
    return outputs, notes


def _narrow(rule: Rule, spec: QuantSpec) -> QuantSpec | None:
    """A table's affine format in the narrowest groups, where its rows divide into these.

    As mlx-vlm's own converter falls back for tables of n-grams, which are most of their release.
    """
    group = AFFINE_GROUP_SIZES[0]
    fits = spec.mode == "affine" and int(rule.expr.shape[-1]) % group == 0
    return replace(spec, group_size=group) if fits and rule.kind is Kind.EMBEDDING else None


def _own_codes(
    view: View, rule: Rule, wanted: QuantSpec | None, dtype: str, options: Options
) -> Repack | str:
    """The rule in its source's own codes where they are wanted and MLX holds them, or why not.

    Without -q the source's quantization is kept; with -q only what equals the recipe is.
    """
    if not rule.quantizable or options.dequantize:
        return "plain weights are asked for" if options.dequantize else ""
    own = repack(rule.expr, view.coded, dtype)
    if options.quant is None or not isinstance(own, Repack):
        return own
    return own if wanted and own.spec.to_config() == wanted.to_config() else ""


def _origin(view: View, rule: Rule, own: Repack | str, spec: QuantSpec | None) -> str:
    """What became of the source's own quantization of a parameter, in words."""
    forms = {view.coded[leaf.name].form for leaf in sources(rule.expr) if leaf.name in view.coded}
    if not forms:
        return ""
    form = " and ".join(sorted(forms))
    if isinstance(own, Repack):
        how = f"repacked, codes unchanged, {own.rounding}" if own.rounding else "repacked exactly"
        return f"{how}: {form}"
    if spec is not None:
        return f"decoded and quantized anew: {form}"
    return f"decoded: {form}{f' ({own})' if own else ''}"


def _usual_spec(outputs: Sequence[Output]) -> QuantSpec | None:
    """The format of most quantized elements, None where nothing is quantized."""
    counts: Counter[QuantSpec] = Counter()
    for out in outputs:
        if out.quant is not None:
            counts[out.quant] += out.elements
    return max(counts, key=lambda spec: (counts[spec], str(spec))) if counts else None


def _decoding(view: View) -> dict[str, Any] | None:
    """What the plan records of the source's own quantization."""
    if view.settings is None:
        return None
    forms = Counter(coded.form for coded in view.coded.values())
    return {"settings": view.settings, "tensors": dict(sorted(forms.items()))}


def _storage_dtype(
    source: Source, rule: Rule, dtype: str | None, *, only: frozenset[str] | None = None
) -> tuple[str, str | None]:
    if isinstance(rule.expr, Leaf):
        codes = only or _alone(source.tensors[rule.expr.name].dtype)
    else:
        codes = frozenset(source.tensors[leaf.name].dtype for leaf in sources(rule.expr))
    code = _stored_code(codes, dtype, rule.kind)
    if code is None:
        found = ", ".join(sorted(codes))
        made = f"{rule.target}: made from {found} in {describe(rule.expr)}"
        wanted = _INTEGERS.get(rule.kind, "floats")
        return "", f"{made}; {wanted} are expected"
    return code, None


@cache
def _alone(code: str) -> frozenset[str]:
    return frozenset((code,))


@cache
def _stored_code(codes: frozenset[str], dtype: str | None, kind: Kind) -> str | None:
    """The storage dtype for sources of these dtypes; None where they are not what is expected."""
    if kind is Kind.INDEX:
        return "I32" if codes <= {"I64", "I32"} else None
    if kind is Kind.HASH:
        return "I64" if codes == {"I64"} else None
    if not codes:
        return TORCH_NAMES[dtype] if dtype else "F32"
    if not codes <= FLOAT_CODES or any(code.startswith("F8") for code in codes):
        return None
    wide = bool(codes & {"F32", "F64"})  # MLX stores no float64
    if kind is Kind.STATE and wide:
        return "F32"
    if dtype is not None:
        code = TORCH_NAMES[dtype]
        return "F32" if code == "F64" else code
    return "F32" if wide or len(codes) > 1 else next(iter(codes))


def _folds(expr: Expr) -> Iterator[Affine]:
    """Every addition and multiplication inside ``expr``."""
    if isinstance(expr, Affine):
        yield expr
    for child in children(expr):
        yield from _folds(child)


def _quantization(
    source: Source, match: Match, options: Options
) -> Callable[[Rule], QuantSpec | None]:
    base = options.quant
    if base is None:
        return lambda rule: None
    allocation = options.allocation
    if allocation is not None:
        return lambda rule: allocation.specs[rule.module] if rule.quantizable else None
    if not options.predicate:
        return lambda rule: base if rule.quantizable else None
    from quant.mixed import mixed_recipe

    nested = source.config.get("text_config")
    text = Facts(nested if isinstance(nested, dict) else source.config)
    try:
        spec_of = mixed_recipe(
            options.predicate,
            module_paths=[rule.module for rule in match.rules if rule.quantizable],
            num_layers=text.count("num_hidden_layers"),
            mode=base.mode,
            group_size=base.group_size,
            method=base.method,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return lambda rule: spec_of(rule.module) if rule.quantizable else None


def _quantization_config(base: QuantSpec, outputs: Sequence[Output]) -> dict[str, Any]:
    """The ``quantization`` entry, with a module's own entry wherever a loader would misjudge it."""
    usual = base.to_config()
    config: dict[str, Any] = dict(usual)
    for out in outputs:
        if out.quant is None:
            continue
        # mlx-vlm quantizes only weights whose element count is a multiple of 64, unless named.
        if (out.quant is not base and out.quant.to_config() != usual) or out.elements % 64:
            config[out.rule.module] = out.quant.to_config()
            if out.rule.module.startswith(_RENAMED):  # mlx-vlm looks the module up by this name
                config[f"model.{out.rule.module.removeprefix(_RENAMED)}"] = out.quant.to_config()
    return config


def main_dtype(outputs: Sequence[Output]) -> str:
    """The dtype of most elements, as torch names it."""
    weights: dict[str, int] = {}
    for out in outputs:
        weights[out.dtype] = weights.get(out.dtype, 0) + out.elements
    return _CODES_TO_TORCH[max(weights, key=lambda code: (weights[code], code))]


def prequantized(source: Source) -> list[str]:
    """The problem of a release whose weights are quantized already."""
    found = quantization_settings(source.config)
    if found is None:
        return []
    method = found.get("quant_method", "an unnamed method")
    return [
        f"config.json: the release is already quantized ({method}); convert the unquantized release"
    ]
