"""Every name of a release: a public copy of its index is as long as our names make it.

An index lists each tensor of a checkpoint with its file. ``tests/indexes.json`` says where public
repositories hold copies of real ones, and their length in characters: written down from what a map
reads, with a shard name of the same width and a size of as many digits, an index must have exactly
that length. One name too many, too few, or one letter longer, and it has not; another name of the
same length is not seen.

``config`` is what the release's config.json says otherwise than the type's example, ``drops`` the
beginning of the names that are left out but are in the file, ``size_digits`` and
``parameter_digits`` how long the numbers of its metadata are, ``ends`` what follows the last brace.
Where only the number of a release's tensors was seen, ``tensors`` is that.
"""

import json
from pathlib import Path

import pytest

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import find
from validate.twin import load_example

INDEXES = json.loads(Path(__file__).with_name("indexes.json").read_text())
SHARD = "model-00001-of-00002.safetensors"
LAYERED = {"layer_types", "mlp_layer_types"}


def names_of(entry):
    config = load_example(entry["type"])
    layers = config.get("num_hidden_layers")
    config |= entry.get("config", {})
    if config.get("num_hidden_layers") != layers:  # as long as another release's
        config = {key: value for key, value in config.items() if key not in LAYERED}
    arch, facts = find(entry["type"].partition(":")[0]), Facts(config)
    wanted = entry.get("layout", arch.layouts[0].name)
    layout = next(layout for layout in arch.layouts if layout.name == wanted)
    tensors = arch.expand(facts, layout)
    assert facts.problems == []
    names = {leaf.name for rule in tensors.rules for leaf in sources(rule.expr)}
    if "drops" in entry:
        names |= {d.name for d in tensors.drops if d.name.startswith(entry["drops"])}
    return names


def written(entry, names):
    digits = {"total_parameters": "parameter_digits", "total_size": "size_digits"}
    metadata = {key: int("1" * entry[name]) for key, name in digits.items() if name in entry}
    shard = entry.get("shard", SHARD)
    index = {"metadata": metadata, "weight_map": dict.fromkeys(sorted(names), shard)}
    return json.dumps(index, indent=2) + entry.get("ends", "\n")


@pytest.mark.parametrize("entry", INDEXES, ids=lambda entry: f"{entry['type']}-{entry['repo']}")
def test_index_of_a_release_is_as_long_as_its_names_make_it(entry):
    names = names_of(entry)
    if "tensors" in entry:
        assert len(names) == entry["tensors"]
        return
    assert len(written(entry, names)) == entry["characters"]
    longest = max(names, key=len)
    assert len(written(entry, names - {longest})) != entry["characters"]
    assert len(written(entry, names - {longest} | {longest + "s"})) != entry["characters"]
