"""Header fixtures: names, dtypes and shapes of releases, without their weights.

A fixture is ``tests/headers/<model_type>/<name>.json``::

    {"origin": "published" | "transformers 5.23.0 meta device" | "map",
     "repo": ..., "revision": ...,      where the release lives, as far as that is known
     "evidence": ...,                   one sentence: what was seen, and where
     "published": {"tensors": n, "parameters": n, "bytes": n},     totals that the release states
     "config": {...} | "example",       config.json, or the shipped example of the type
     "tensors": {"model.layers.{0-2,4}.mlp.up_proj.weight": ["BF16", [3072, 1024]], ...}}

``{0-2,4}`` stands for the layers 0, 1, 2 and 4. Write one from a release's headers with
``python tests/header_fixtures.py SRC NAME`` (SRC: a folder or a hub id; no weights are read), or
from the reference implementation with ``python tests/header_fixtures.py --example TYPE NAME``.
Where neither can be had, ``--map TYPE NAME`` writes down what the map reads, so that a change
shows.
"""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arch_maps.dtypes import itemsize
from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import find, map_name
from converter.plan.match import ranges
from converter.source import Header, Source, TensorInfo, build_source
from validate.stand_ins import stand_in
from validate.torch_faults import mend
from validate.twin import load_example

ROOT = Path(__file__).parent / "headers"
TOTALS = {"tensors", "parameters", "bytes"}
_FILE = "model.safetensors"
_SET = re.compile(r"\{([\d,-]+)\}")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Fixture:
    path: Path
    data: dict[str, Any]
    config: dict[str, Any]
    tensors: Tensors

    @property
    def model_type(self) -> str:
        return self.path.parent.name

    @property
    def id(self) -> str:
        return f"{self.model_type}/{self.path.stem}"

    def totals(self) -> dict[str, int]:
        sizes = [(code, math.prod(shape)) for code, shape in self.tensors.values()]
        return {
            "tensors": len(sizes),
            "parameters": sum(count for _, count in sizes),
            "bytes": sum(count * itemsize(code) for code, count in sizes),
        }

    def source(self, tensors: Tensors | None = None, **config: Any) -> Source:
        """What the converter knows of such a release; ``config`` overrides entries."""
        return source_of({**self.config, **config}, self.tensors if tensors is None else tensors)


def load(path: Path) -> Fixture:
    data = json.loads(path.read_text())
    config = data["config"]
    if config == "example":
        config = load_example(path.parent.name)
    return Fixture(path, data, config, expand(data["tensors"]))


def fixtures() -> list[Fixture]:
    return [load(path) for path in sorted(ROOT.glob("*/*.json"))]


def source_of(config: dict[str, Any], tensors: Tensors) -> Source:
    at, found = 0, {}
    for name, (code, shape) in sorted(tensors.items()):
        size = math.prod(shape) * itemsize(code)
        found[name] = TensorInfo(name, code, shape, _FILE, at, at + size)
        at += size
    header = Header(_FILE, at, "0" * 64, found, {"format": "pt"})
    return build_source(where="fixture", config=config, headers={_FILE: header})


def expand(entries: dict[str, Any]) -> Tensors:
    tensors: Tensors = {}
    for pattern, (code, shape) in entries.items():
        for name in _names(pattern):
            assert name not in tensors, f"{name} is listed twice"
            tensors[name] = (code, tuple(shape))
    return tensors


def _names(pattern: str) -> list[str]:
    found = _SET.search(pattern)
    if found is None:
        return [pattern]
    names = []
    for span in found[1].split(","):
        low, _, high = span.partition("-")
        for index in range(int(low), int(high or low) + 1):
            names += _names(pattern[: found.start()] + str(index) + pattern[found.end() :])
    return names


def collapse(tensors: Tensors) -> dict[str, Any]:
    """The notation of a fixture's ``tensors``: one entry for the layers that agree."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = defaultdict(list)
    plain: dict[str, Any] = {}
    for name, (code, shape) in tensors.items():
        index = _INDEX.search(name)
        if index is None:
            plain[name] = [code, list(shape)]
        else:
            pattern = f"{name[: index.start()]}{{}}{name[index.end() :]}"
            groups[pattern, code, shape].append(int(index[0]))
    for (pattern, code, shape), numbers in groups.items():
        plain[pattern.replace("{}", f"{{{ranges(sorted(numbers))}}}")] = [code, list(shape)]
    return dict(sorted(plain.items()))


def dump(path: Path, data: dict[str, Any]) -> None:
    """Write a fixture with one tensor entry to a line."""
    rest = {key: value for key, value in data.items() if key != "tensors"}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in data["tensors"].items()
    ]
    text = json.dumps(rest, indent=1)[:-2] + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def from_release(src: str) -> dict[str, Any]:
    from converter.release import open_release

    release = open_release(src)
    found = {n: (t.dtype, t.shape) for n, t in release.source.tensors.items()}
    return {
        "origin": "published",
        "repo": release.origin.get("repo", release.name),
        "revision": release.origin.get("commit"),
        "evidence": "Headers and config.json of the release.",
        "config": release.source.config,
        "tensors": collapse(found),
    }


def from_reference(model_type: str) -> dict[str, Any]:
    """The full-size class of the reference implementation, without memory for its weights."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = load_example(model_type)
    cls = getattr(transformers, config["architectures"][0])
    mend(model_type)
    other = stand_in(config)
    settings = other.config(config) if other else config
    with torch.device("meta"):
        known = cls.config_class
        model = cls(known.from_dict({**settings, "model_type": known.model_type}))
    # As it would save them: newer classes join experts that releases store one by one.
    names = dict(revert_weight_conversion(model, model.state_dict()))
    if getattr(model.config, "tie_word_embeddings", False):
        for copy in ("lm_head.weight", *model.all_tied_weights_keys):
            names.pop(copy, None)
    return {
        "origin": f"transformers {transformers.__version__} meta device",
        "evidence": f"state_dict of {cls.__name__} built from the example config.",
        "config": "example",
        "tensors": collapse({name: (_code(t), tuple(t.shape)) for name, t in names.items()}),
    }


def _code(tensor: Any) -> str:
    """bfloat16, as releases have it, but for tables of integers."""
    return "BF16" if tensor.is_floating_point() else "I64"


def from_map(model_type: str) -> dict[str, Any]:
    """What the map reads at full size: no evidence about the release but the runtime's loader."""
    arch = find(model_type)
    assert arch is not None
    tensors = arch.expand(Facts(load_example(model_type)), arch.layouts[0])
    leaves = (leaf for rule in tensors.rules for leaf in sources(rule.expr))
    return {
        "origin": "map",
        "evidence": "No headers of the release and no class: names as the runtime's loader takes "
        "them.",
        "config": "example",
        "tensors": collapse({t.name: ("BF16", tuple(map(int, t.shape))) for t in leaves}),
    }


def main(arguments: list[str]) -> None:
    known = {"--example": from_reference, "--map": from_map}
    read = known.get(arguments[0])
    data = read(arguments[1]) if read else from_release(arguments[0])
    config = data["config"]
    model_type = arguments[1] if config == "example" else map_name(config)
    path = ROOT / model_type / f"{arguments[-1]}.json"
    dump(path, data)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
