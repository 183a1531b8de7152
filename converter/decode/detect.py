"""Which scheme a release is quantized with, from its config alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import cache, partial
from typing import Any

from arch_maps.config import stored_dtype
from arch_maps.dtypes import TORCH_NAMES
from arch_maps.facts import Facts
from arch_maps.ops import Shape, sources
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Rule
from converter.config_errors import config_errors
from converter.decode.model import View
from converter.errors import PlanError
from converter.source import Source


def quantization_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The release's own quantization settings, from wherever its config has them."""
    for section in (config, config.get("text_config")):
        found = section.get("quantization_config") if isinstance(section, Mapping) else None
        if isinstance(found, dict):
            return found
    return None


def decoded(source: Source, *, arch: ArchMap | None = None, dtype: str | None = None) -> View:
    """The release without its own quantization; raises PlanError with every problem.

    A source without one comes back as it is. Tensors of a quantized torch release get the dtype
    that it declares, those of an MLX checkpoint that of their scales; ``dtype`` computes in another
    (F32: the kernels' own precision, without a last rounding). ``arch`` is the map for
    schemes that do not store logical shapes in headers, None for the registry's.
    """
    own = source.config.get("quantization")
    in_mlx = source.mlx is not None or isinstance(own, dict)
    settings = own if in_mlx else quantization_settings(source.config)
    if not isinstance(settings, dict):
        return View(source=source)
    from converter.decode import mlx  # most releases need none of the readers
    from converter.decode.build import Builder
    from converter.decode.schemes import SCHEMES

    declared = TORCH_NAMES.get(stored_dtype(source.config) or "bfloat16", "BF16")
    rules = _expander(source, arch)
    build = Builder(
        dict(source.tensors),
        dtype or declared,
        cache(partial(_shapes, rules)),
        cache(partial(_tables, rules)),
        gguf=source.gguf,
        gguf_drops=source.gguf_drops,
    )
    if in_mlx:
        mlx.read(settings, build, dtype=dtype)
    else:
        method = settings.get("quant_method")
        scheme = SCHEMES.get(method) if isinstance(method, str) else None
        if scheme is None:
            known = ", ".join(sorted(SCHEMES))
            raise PlanError(
                [
                    f"config.json: the release is quantized with {method!r}, which is not decoded "
                    f"(only {known} are); convert the unquantized release"
                ]
            )
        with config_errors(f"the reader of {method}"):
            scheme(settings, build)
        # a GGUF file may be plain throughout
        if not build.coded and not build.problems and not source.gguf:
            build.problem(f"config.json: says {method}, but no tensor is quantized so")
    if build.problems:
        raise PlanError(build.problems)
    plain = source if source.mlx is not None else replace(source, config=_plain(source.config))
    return View(
        source=replace(plain, tensors=build.tensors),
        coded=build.coded,
        drops=tuple(build.drops),
        settings=None if source.mlx is not None else settings,
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without quantization settings, at the top and below."""
    out = copy.deepcopy(dict(config))
    for section in (out, *(value for value in out.values() if isinstance(value, dict))):
        section.pop("quantization_config", None)
    return out


def _expander(source: Source, arch: ArchMap | None) -> Callable[[], list[Rule]]:
    """The rules of the release's map in every layout, worked out once and when first needed."""

    @cache
    def rules() -> list[Rule]:
        from converter.plan.match import find_map  # plans read decoded views themselves

        chosen = arch or find_map(source.config)
        found: list[Rule] = []
        for layout in chosen.layouts:
            with config_errors("the map of the release"):
                found += chosen.expand(Facts(source.config), layout).rules
        return found

    return rules


def _shapes(rules: Callable[[], list[Rule]]) -> dict[str, tuple[Shape, ...]]:
    """What the release's map makes of each tensor, in every layout."""
    found: dict[str, tuple[Shape, ...]] = {}
    for rule in rules():
        for leaf in sources(rule.expr):
            shape = tuple(map(int, leaf.shape))
            found[leaf.name] = (*found.get(leaf.name, ()), shape)
    return found


def _tables(rules: Callable[[], list[Rule]]) -> Set[str]:
    """The tensors that the release's map makes look-up tables of."""
    tables = (rule for rule in rules() if rule.kind is Kind.EMBEDDING)
    return {leaf.name for rule in tables for leaf in sources(rule.expr)}
