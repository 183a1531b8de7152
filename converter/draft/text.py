"""Printing a drafted map as the Python file that its author goes on from."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arch_maps.rules import Drop, Kind, Part, Rule
from converter.draft.groups import Grouped, Layered, condition
from converter.draft.sizes import Sizes
from converter.draft.statements import hoisted, leaf_of, statements
from converter.draft.words import Words, call, lookups, quoted, tuple_text, views, wrapped

_OPS = (
    "Affine",
    "Concat",
    "Constant",
    "HeadHadamard",
    "LowRank",
    "Permute",
    "Reshape",
    "Slice",
    "Stack",
)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_DIGITS = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Everything the file says."""

    model_type: str
    config: Mapping[str, Any]
    grouped: Grouped
    drops: Sequence[Drop]
    sizes: Sizes
    prefix: str
    """What the runtime's own paths have before the targets of the map."""
    runtimes: Sequence[str]
    modalities: Sequence[str]
    pipeline_tag: str
    title: str
    """The loader that was followed."""
    near: Sequence[str]
    remarks: Sequence[str]
    """What the author must look at."""


def file_text(sheet: Sheet) -> str:
    """The whole file."""
    words: list[Words] = []
    functions = [_function(sheet, stack, words) for stack in sheet.grouped.stacks]
    functions.append(_tensors(sheet, words))
    functions.append(_config(sheet))
    body = "\n\n\n".join("\n".join(lines) for lines in functions)
    ops = [name for name in _OPS if re.search(rf"(?<![\w.]){name}\(", body)]
    imports = [
        "from __future__ import annotations\n",
        "from typing import Any\n",
        "from arch_maps import config as spell",
        "from arch_maps.facts import Facts",
        *([f"from arch_maps.ops import {', '.join(ops)}"] if ops else []),
        "from arch_maps.registry import ArchMap",
        f"from arch_maps.rules import {'Kind, ' if 'Kind.' in body else ''}Layout, Mount",
    ]
    unsure: dict[int, set[str]] = defaultdict(set)
    for one in words:
        for size, texts in one.unsure.items():
            unsure[size] |= texts
    remarks = [
        *sheet.remarks,
        *(f"{size} may be {' or '.join(sorted(texts))}" for size, texts in sorted(unsure.items())),
    ]
    head = [
        f'"""{sheet.model_type}: drafted from the loader of {sheet.title}; review before use.',
        "",
        *(f"Nearest known: {line}" for line in sheet.near),
        *(["", "To look at:"] if remarks else []),
        *(f"- {line}" for line in remarks),
        '"""',
    ]
    return "\n".join(head) + "\n\n" + "\n".join(imports) + f"\n\n\n{body}\n\n\n{_map(sheet)}"


def _function(sheet: Sheet, stack: Layered, words: list[Words]) -> list[str]:
    """The rules of one list of layers, as a function of its mount."""
    own = Words(sheet.sizes)
    words.append(own)
    section = _section(sheet.config, stack.part)
    data = sheet.config.get(section, sheet.config) if section else sheet.config
    count, facts_of_count = _layer_count(sheet.config, section, stack.count)
    by_test: dict[tuple[str, tuple[str, ...]] | None, list[tuple[Rule, int]]] = defaultdict(list)
    for rule, indices in stack.rules:
        by_test[condition(indices, stack.count, data)].append((rule, indices[0]))
    lines = []
    read: dict[str, str] = {}
    sections = {section} if facts_of_count else set()
    for test, members in by_test.items():
        labelled = [
            (rule, own.labels(f"{sheet.prefix}{stack.target}.{index}.{rule.target}"))
            for rule, index in members
        ]
        own.learn((rule.expr, labels) for rule, labels in labelled)
        indent = 8
        if test is not None:
            lines.append(f"        if {test[0]}:")
            read |= {name: _read(name, data[name], section) for name in test[1]}
            sections |= {section} if test[1] else set()
            indent = 12
        for statement in hoisted(statements(labelled, "layer", own)):
            lines += wrapped(statement, indent)
    name, there, here = _names(stack)
    index = "index" if any(test is not None for test in by_test) else "_"
    loop = [f"    for {index}, layer in at.layers({quoted(here)}, {count}):"]
    if there != here:
        place = f'at.at(source=f"{there}.{{index}}", target=f"{here}.{{index}}")'
        loop = [f"    for index in range({count}):", f"        layer = {place}"]
    sections |= {one for one, _ in own.used.values()}
    return [
        f"def {name}(at: Mount, facts: Facts) -> None:",
        f'    """Layers {stack.target}.* below ``at``."""',
        *(f"    {line}" for line in views(sections)),
        *(f"    {line}" for line in sorted(read.values())),
        *(f"    {line}" for line in lookups(own.used)),
        *loop,
        *lines,
    ]


def _tensors(sheet: Sheet, words: list[Words]) -> list[str]:
    """The map's entry: what stands alone, the stacks, the drops."""
    own = Words(sheet.sizes)
    words.append(own)
    labelled = [(rule, own.labels(sheet.prefix + rule.target)) for rule in sheet.grouped.single]
    own.learn((rule.expr, labels) for rule, labels in labelled)
    lines: list[str] = []
    by_part: dict[Part, list[tuple[Rule, Any]]] = defaultdict(list)
    for rule, labels in labelled:
        by_part[rule.part].append((rule, labels))
    for part, members in by_part.items():
        mount = "root"
        if part != "text":
            mount = f"{part}_root"
            lines.append(f'    {mount} = root.at(source="", target="", part="{part}")')
        for statement in hoisted(statements(members, mount, own, tied=_tied(sheet))):
            lines += wrapped(statement, 4)
    for stack in sheet.grouped.stacks:
        name, _, _ = _names(stack)
        source, target = _parent(stack.source), _parent(stack.target)
        told = [] if stack.part == "text" else [f'part="{stack.part}"']
        if source == target and not told:
            place = f"root / {quoted(source)}" if source else "root"
        else:
            place = call("root.at", [f"source={quoted(source)}", f"target={quoted(target)}", *told])
        lines += wrapped(call(name, [place, "facts"]), 4)
    lines += _drops(sheet, own)
    sections = {one for one, _ in own.used.values()}
    return [
        "def _tensors(root: Mount, facts: Facts, _: Layout) -> None:",
        *(f"    {line}" for line in views(sections)),
        *(f"    {line}" for line in lookups(own.used)),
        *lines,
    ]


def _drops(sheet: Sheet, words: Words) -> list[str]:
    """The drops, those that differ only in numbers in one loop each."""
    patterns: dict[tuple[str, str, tuple[int, ...] | None, str | None], list[Drop]] = {}
    for drop in sheet.drops:
        numbers = _DIGITS.findall(drop.name)
        pattern = _DIGITS.sub("{index}", drop.name, count=1) if numbers else drop.name
        same = None if drop.same_as is None else drop.same_as
        patterns.setdefault((pattern, drop.reason, drop.shape, same), []).append(drop)
    lines: list[str] = []
    tied = _tied(sheet)
    heads = any(rule.kind is Kind.HEAD for rule in sheet.grouped.single)
    if tied is not None and not heads:
        table = next((d for d in sheet.drops if d.same_as is not None), None)
        embedding = _table(sheet)
        dims = words.dims(embedding.expr.shape, words.labels(sheet.prefix + embedding.target))
        name = "lm_head" if table is None else table.name.removesuffix(".weight")
        lines += wrapped(call("root.head", [quoted(name), *dims, f"tied_to={tied}"]), 4)
    alone: dict[str, list[str]] = defaultdict(list)
    for (pattern, reason, shape, same), drops in patterns.items():
        if same is not None and tied is not None and not heads:
            continue
        more = [str(size) for size in shape or ()]
        if same is not None:
            more.append(f"same_as={quoted(same)}")
            lines += wrapped(call("root.drop", [quoted(drops[0].name), quoted(reason), *more]), 4)
            continue
        if len(drops) == 1:
            alone[reason].append(tuple_text([quoted(drops[0].name), *more]))
            continue
        numbers = sorted(int(_DIGITS.findall(drop.name)[0]) for drop in drops)
        span = (
            f"range({numbers[0]}, {numbers[-1] + 1})" if numbers[0] else f"range({numbers[-1] + 1})"
        )
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            span = tuple_text(map(str, numbers))
        lines.append(f"    for index in {span}:")
        lines += wrapped(call("root.drop", [f"f{quoted(pattern)}", quoted(reason), *more]), 8)
    for reason, listed in alone.items():
        lines += ["    for name, *shape in (", *(f"        {one}," for one in listed), "    ):"]
        lines += wrapped(call("root.drop", ["name", quoted(reason), "*shape"]), 8)
    return lines


def _config(sheet: Sheet) -> list[str]:
    """The config map: a copy with positions in every spelling."""
    lines = [
        "def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:",
        "    out = spell.start(config)",
    ]
    for section, data in [("", sheet.config), *sheet.config.items()]:
        if not isinstance(data, Mapping) or not ({"rope_theta", "rope_parameters"} & data.keys()):
            continue
        parameters = data.get("rope_parameters")
        if isinstance(parameters, Mapping) and any(
            isinstance(value, Mapping) for value in parameters.values()
        ):
            continue
        where = f"out[{quoted(section)}]" if section else "out"
        view = f"facts.section({quoted(section)})" if section else "facts"
        lines.append(f"    {where}.update(spell.spell_rope(spell.rope({view})))")
    return [*lines, "    return out"]


def _map(sheet: Sheet) -> str:
    extra = []
    if tuple(sheet.modalities) != ("text",):
        extra.append(f"    modalities={tuple_text(map(quoted, sheet.modalities))},")
    if sheet.pipeline_tag != "text-generation":
        extra.append(f"    pipeline_tag={quoted(sheet.pipeline_tag)},")
    lines = [
        "MAP = ArchMap(",
        f"    model_type={quoted(sheet.model_type)},",
        "    tensors=_tensors,",
        "    config=_config,",
        '    layouts=(Layout("published", {}),),',
        f"    runtimes={tuple_text(map(quoted, sheet.runtimes))},",
        '    parts=("drafted",),',
        *extra,
        ")",
    ]
    return "\n".join(lines) + "\n"


def _tied(sheet: Sheet) -> str | None:
    """The argument ``tied_to`` of the head, where the config says whether it is tied."""
    stated = [data for data in (sheet.config, *sheet.config.values()) if isinstance(data, Mapping)]
    if not any("tie_word_embeddings" in data for data in stated):
        return None
    try:
        table = leaf_of(_table(sheet).expr)
    except LookupError:
        return None
    if table is None:
        return None
    top = "tie_word_embeddings" in sheet.config
    view = "facts" if top else 'facts.section("text_config")'
    value = stated[0 if top else 1].get("tie_word_embeddings")
    return f'{quoted(table.name)} if {view}.flag("tie_word_embeddings", {bool(value)}) else None'


def _table(sheet: Sheet) -> Rule:
    for rule in sheet.grouped.single:
        if rule.kind is Kind.EMBEDDING and rule.part == "text":
            return rule
    raise LookupError("no embedding")


def _section(config: Mapping[str, Any], part: Part) -> str:
    """The section of the config that describes a part; the top level where there is none."""
    wanted = {"vision": ("vision_config",), "audio": ("audio_config",)}.get(
        part, ("text_config", "llm_config")
    )
    return next((name for name in wanted if isinstance(config.get(name), Mapping)), "")


def _layer_count(config: Mapping[str, Any], section: str, count: int) -> tuple[str, bool]:
    data = config.get(section, config) if section else config
    name = next((name for name in _COUNTS if data.get(name) == count), None)
    if name is None:
        return str(count), False
    view = "facts"
    if section:
        view = views([section])[0].partition(" ")[0]
    return f"{view}.count({quoted(name)})", True


def _read(name: str, value: Any, section: str) -> str:
    view = views([section])[0].partition(" ")[0] if section else "facts"
    if isinstance(value, list):
        return f"{name} = {view}.data[{quoted(name)}]"
    return f"{name} = {view}.size({quoted(name)})"


def _names(stack: Layered) -> tuple[str, str, str]:
    """The name of a stack's function, and what its layers are called there and here."""
    here = stack.target.rpartition(".")[2]
    there = stack.source.rpartition(".")[2] if stack.source else here
    words = re.sub(r"\W+", "_", stack.target.replace("language_model.", ""))
    return f"_{words}", there, here


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
