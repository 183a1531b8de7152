"""Every mapped type is complete: example config, header fixture, twin, runtimes, parts."""

import importlib
from pathlib import Path

import header_fixtures
import pytest

from arch_maps import registry
from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import ArchMap, find, map_name, model_types
from arch_maps.rules import Kind, targets
from arch_maps.unmapped import RUNTIME_ONLY, UNMAPPED
from converter.errors import PlanError
from converter.plan.match import find_map, match_release
from converter.source import open_folder
from validate.twin import list_examples, list_variants, load_example

RUNTIMES = {"mlx-vlm": "mlx_vlm", "mlx-lm": "mlx_lm"}
MODALITIES = {"text", "image", "audio", "video"}
TAGS = {
    *("text-generation", "image-text-to-text", "sentence-similarity", "any-to-any"),
    "image-feature-extraction",
}
ENCODING = {"sentence-similarity", "image-feature-extraction"}
BESIDE_A_TABLE = {
    "gemma4_assistant": "a table that is sparse in use and never quantized",
    "qwen3_dflash": "the model's own, which the drafter borrows",
}
each_type = pytest.mark.parametrize("model_type", model_types())


def test_the_registry_is_the_folder():
    folder = header_fixtures.ROOT.parents[1] / "arch_maps" / "models"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    modules = {registry._MODULES.get(name, name) for name in model_types()}
    assert modules == files
    assert list(model_types()) == sorted(model_types())
    assert find("no_such_type") is None


@each_type
def test_type_has_an_example_config(model_type):
    assert model_type in list_examples()
    config = load_example(model_type)
    assert map_name(config) == model_type
    assert config["architectures"]


@pytest.mark.parametrize("variant", list_variants())
def test_variant_is_another_release_of_its_type(variant):
    model_type = variant.partition(":")[0]
    config, arch = load_example(variant), find(model_type)
    assert map_name(config) == model_type
    assert config["architectures"]
    assert config not in [
        load_example(other)
        for other in (model_type, *list_variants(model_type))
        if other != variant
    ]
    facts = Facts(config)
    arch.expand(facts, arch.layouts[0])
    arch.config(config, facts)
    assert facts.problems == []


@pytest.mark.usefixtures("runtimes")
def test_every_type_that_both_sides_know_has_a_map_or_a_reason():
    import mlx_lm.utils
    import mlx_vlm.utils
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    def known(utils, name):
        place = Path(utils.__file__).parent / "models"
        module = utils.MODEL_REMAPPING.get(name, name)
        return (place / f"{module}.py").exists() or (place / module / "__init__.py").exists()

    both = {n for n in CONFIG_MAPPING_NAMES if known(mlx_lm.utils, n) or known(mlx_vlm.utils, n)}
    assert both - set(model_types()) == set(UNMAPPED)
    for name in RUNTIME_ONLY:
        assert known(mlx_lm.utils, name) or known(mlx_vlm.utils, name)
        assert name not in {*both, *model_types()}
    with pytest.raises(PlanError, match=r"no map for model_type 'flux2'.*it makes pictures"):
        find_map({"model_type": "flux2"})
    with pytest.raises(PlanError, match=r"no map for model_type 'bitnet'.*Metal kernel"):
        find_map({"model_type": "bitnet"})
    with pytest.raises(PlanError, match=r"no map for model_type 'phi3_v'.*in the runtime's code"):
        find_map({"model_type": "phi3_v"})


@pytest.mark.usefixtures("runtimes")
def test_every_package_and_name_of_the_runtimes_has_a_map_or_a_reason():
    import mlx_lm.utils
    import mlx_vlm.utils
    from mlx_vlm.embedding_loader import EMBEDDING_MODEL_REMAPPING

    named = {*model_types(), *UNMAPPED, *RUNTIME_ONLY}
    for utils in (mlx_lm.utils, mlx_vlm.utils):
        place = Path(utils.__file__).parent / "models"
        files = {p.stem for p in place.glob("*.py") if "\nclass Model(" in p.read_text()}
        packages = {p.parent.name for p in place.glob("*/__init__.py")}
        remapped = {utils.MODEL_REMAPPING.get(name, name) for name in named}
        remapped |= {EMBEDDING_MODEL_REMAPPING.get(name, name) for name in named}
        assert (files | packages) - remapped <= _OTHERWISE
        assert {map_name({"model_type": name}) for name in utils.MODEL_REMAPPING} <= named


_OTHERWISE = {"hunyuan", "klear", "lfm2-vl", "lfm2_embedding"}
"""Packages of maps that go by the class that a release names, by its spelling or by its text."""


def test_no_example_without_a_map():
    assert set(list_examples()) == set(model_types())


@each_type
def test_type_has_a_header_fixture(model_type):
    assert list((header_fixtures.ROOT / model_type).glob("*.json")), (
        f"python tests/header_fixtures.py SRC NAME  (or --example {model_type} NAME)"
    )


def test_no_fixture_without_a_map():
    assert {path.name for path in header_fixtures.ROOT.iterdir()} <= set(model_types())


@each_type
def test_type_has_a_twin_that_its_map_accounts_for(model_type, twin_of):
    """As the reference implementation itself saves it."""
    source = open_folder(twin_of(model_type))
    match = match_release(source, find(model_type))
    used = {leaf.name for rule in match.rules for leaf in sources(rule.expr)}
    assert used | {drop.name for drop in match.drops} == set(source.tensors)


@pytest.mark.usefixtures("runtimes")
@each_type
def test_runtimes_are_the_ones_that_have_the_model(model_type):
    from validate.runtime import runtimes_for

    arch = find(model_type)
    facts = Facts(load_example(model_type))
    config = arch.config(load_example(model_type), facts)
    assert facts.problems == []
    assert set(arch.runtimes) <= set(RUNTIMES)
    assert runtimes_for(config) == tuple(RUNTIMES[name] for name in arch.runtimes)


@each_type
def test_parts_exist_and_are_the_ones_that_are_mounted(model_type):
    arch = find(model_type)
    for name in arch.parts:
        importlib.import_module(f"arch_maps.{name}")
    tensors = arch.expand(Facts(load_example(model_type)), arch.layouts[0])
    kinds = {"text": "text", "vision": "vision", "audio": "audio", "projector": "projectors"}
    named = {name.partition(".")[0] for name in arch.parts}
    mounted = {kinds[rule.part] for rule in tensors.rules}
    # A projector may be a few tensors of its tower's own file.
    assert named <= mounted <= named | {"projectors"}


@each_type
def test_what_a_map_says_of_itself(model_type):
    arch = find(model_type)
    assert arch.layouts
    assert len({layout.name for layout in arch.layouts}) == len(arch.layouts)
    assert set(arch.modalities) <= MODALITIES
    sees = any(n.startswith("vision.") for n in arch.parts)
    unjudged = any("Pictures" in remark for remark in arch.remarks)  # the runtime is wrong there
    assert sees == ("image" in arch.modalities or unjudged)
    assert arch.pipeline_tag in TAGS
    assert all(remark.endswith(".") for remark in arch.remarks)


@each_type
def test_targets_are_filled_once_and_drops_said_once(model_type):
    arch = find(model_type)
    tensors = arch.expand(Facts(load_example(model_type)), arch.layouts[0])
    assert len(targets(tensors.rules)) == len(tensors.rules)
    assert len({drop.name for drop in tensors.drops}) == len(tensors.drops)


@each_type
def test_an_empty_config_is_a_list_of_problems_not_a_crash(model_type):
    arch = find(model_type)
    for layout in arch.layouts:
        facts = Facts({"model_type": model_type})
        arch.expand(facts, layout)
        assert facts.problems
        assert all("config.json" in problem for problem in facts.problems)


def test_a_file_whose_map_has_another_name_is_a_fault(monkeypatch):
    module = importlib.import_module("arch_maps.models.llama")
    monkeypatch.setattr(module, "MAP", find("qwen3"))
    registry.find.cache_clear()
    with pytest.raises(AssertionError):
        find("llama")
    monkeypatch.undo()
    registry.find.cache_clear()
    assert isinstance(find("llama"), ArchMap)


@each_type
def test_logits_come_from_a_head_or_from_one_table(model_type):
    """A generator has a head, or one embedding that is its head as well; an encoder neither."""
    arch = find(model_type)
    tensors = arch.expand(Facts(load_example(model_type)), arch.layouts[0])
    heads = [rule.target for rule in tensors.rules if rule.kind is Kind.HEAD]
    tied = [rule.target for rule in tensors.rules if rule.tied]
    generates = "text" in arch.modalities and arch.pipeline_tag not in ENCODING
    if model_type in BESIDE_A_TABLE:
        assert not heads + tied
    elif generates:
        assert bool(heads) != bool(tied)
        assert len(tied) <= 1
    else:
        assert not tied
