"""What `convert maps list` says of every type is what the fixtures and the last matrix say."""

import json
from pathlib import Path

import pytest

from arch_maps.evidence import evidence
from arch_maps.registry import model_types
from validate.twin import list_variants

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows():
    matrix = json.loads((ROOT / "docs" / "parity-matrix.json").read_text())
    return {row["model_type"]: row for row in matrix["rows"]}


def test_the_matrix_has_every_type_and_variant(rows):
    assert set(rows) == {*model_types(), *list_variants()}


@pytest.mark.parametrize("model_type", model_types())
def test_evidence_is_that_of_the_matrix_and_the_fixtures(model_type, rows):
    found = evidence()[model_type]
    folder = ROOT / "tests" / "headers" / model_type
    assert found.fixtures == tuple(sorted(path.stem for path in folder.glob("*.json")))
    assert found.fixtures
    assert found.parity == rows[model_type]["published"]["verdict"]
    assert found.parity in ("pass", "unproven")
    assert len(found.twins) == 1 + len(list_variants(model_type))
    assert found.restored == rows[model_type]["restored"]
    assert found.errors or found.parity == "unproven"


def test_the_list_shows_it(program):
    import subprocess

    done = subprocess.run([*program, "maps", "list", "--json"], capture_output=True, check=True)
    listed = {row["model_type"]: row for row in json.loads(done.stdout)}
    assert list(listed) == list(model_types())
    assert listed["qwen3"]["parity"] == "pass"
    assert listed["qwen3"]["to torch"] == "bit for bit"
    assert listed["qwen3"]["fixtures"]
    assert any(twin.startswith("untied: ") for twin in listed["qwen3"]["twins"])
