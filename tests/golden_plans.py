"""Plans of real releases as golden files; ``python tests/golden_plans.py [TYPE ...]`` writes anew.

A golden file holds what decides the output: every parameter's origin, kind, storage and
quantization (one entry for the layers that agree), the drops, the config, the notes, and the
size and header hash of every shard, which pin each tensor's offset. Program version, plan hash
and the identity of the source are left out.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import header_fixtures

from arch_maps.registry import ArchMap, find, model_types
from converter.plan import Options, Plan, build_plan
from converter.plan.match import match_release, ranges
from quant.recipe import QuantSpec

FOLDER = Path(__file__).parent / "golden"
RECIPES = {
    "4bit": Options(quant=QuantSpec.make("affine", 4, 64)),
    "bf16": Options(dtype="bfloat16"),
}
_INDEX = re.compile(r"\.(\d+)\.")


LARGEST = 2100
"""Tensors of a release with golden plans; per-expert lists of more would fill megabytes."""

BULKY = {"florence2", "gemma3n", "inkling_mm_model", "phimoe", "qwen4_exp"}
"""Types whose plans would, because hardly two of their layers, blocks or parts are alike, or
because those that are take turns with others."""


def golden_types(wanted: Sequence[str] = ()) -> list[str]:
    """The types with golden plans: all but those whose fixture is a large mixture of experts."""
    named = [name for name in wanted or model_types() if name not in BULKY]
    return [name for name in named if len(release(name).tensors) <= LARGEST]


def golden_cases(wanted: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(type, recipe): a release without a text part has nothing to quantize."""
    return [
        (name, recipe)
        for name in golden_types(wanted)
        for recipe, options in RECIPES.items()
        if options.quant is None or "text" in _arch(name).modalities
    ]


def _arch(model_type: str) -> ArchMap:
    arch = find(model_type)
    assert arch is not None
    return arch


def release(model_type: str) -> header_fixtures.Fixture:
    """The fixture of the shipped example config, or the first one of the type."""
    paths = sorted((header_fixtures.ROOT / model_type).glob("*.json"))
    assert paths, f"{model_type} has no header fixture: see docs/adding-an-architecture.md"
    found = [header_fixtures.load(path) for path in paths]
    return next((f for f in found if f.data["config"] == "example"), found[0])


def plan_of(model_type: str, recipe: str) -> Plan:
    source = release(model_type).source()
    return build_plan(source, match_release(source, _arch(model_type)), RECIPES[recipe])


def golden(plan: Plan) -> dict[str, Any]:
    """What a golden file says of a plan."""
    found = plan.to_json()
    outputs = [_without_places(entry) for entry in found["outputs"]]
    drops = [{"target": d.pop("name"), **d} for d in found["drops"]]
    return {
        **{key: found[key] for key in ("model_type", "layout", "recipe", "parameters", "notes")},
        "shards": {
            s.file: {"bytes": s.size, "header": hashlib.sha256(s.header).hexdigest()}
            for s in plan.shards
        },
        "config": found["config"],
        "outputs": _collapsed(outputs),
        "drops": _collapsed(drops),
    }


def _without_places(entry: dict[str, Any]) -> dict[str, Any]:
    stored = {role: [dtype, shape] for role, (_, _, dtype, shape) in entry["stored"].items()}
    return {**entry, "stored": stored}


def _collapsed(entries: list[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[str, list[int]] = defaultdict(list)
    result: dict[str, Any] = {}
    for entry in entries:
        index = _INDEX.search(entry["target"])
        text = json.dumps(entry)
        if index is None:
            result[entry["target"]] = _body(text)
        else:
            groups[text.replace(index[0], ".{}.")].append(int(index[1]))
    for text, numbers in groups.items():
        name = json.loads(text)["target"].replace("{}", f"{{{ranges(sorted(numbers))}}}")
        assert name not in result
        result[name] = _body(text)
    return dict(sorted(result.items()))


def _body(text: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(text)
    del entry["target"]
    return entry


def path_of(model_type: str, recipe: str) -> Path:
    return FOLDER / f"plan_{model_type}_{recipe}.json"


def render(content: dict[str, Any]) -> str:
    """JSON with one line for each output and drop, so that a diff shows what changed."""
    parts = []
    for key, value in content.items():
        if key in ("outputs", "drops") and value:
            lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            inner = json.dumps(value, indent=1, sort_keys=True).replace("\n", "\n ")
            parts.append(f" {json.dumps(key)}: {inner}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(wanted: Sequence[str] = ()) -> None:
    for model_type, recipe in golden_cases(wanted):
        path = path_of(model_type, recipe)
        path.write_text(render(golden(plan_of(model_type, recipe))))
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
