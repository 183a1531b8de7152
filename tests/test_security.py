"""SECURITY.md says what is kept, and by which tests; here that those tests are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[(\w[^\]]*)\]\(([^)]+)\)")
LINKS = LINK.findall(TEXT)
CASES = (
    "header over 100 MB",
    "header truncated",
    "overlapping or holed offsets",
    "trailing bytes",
    "duplicate keys",
    "negative or overflowing shapes",
    "shape and dtype against bytes",
    "unknown dtype",
    "zero-size tensors",
    "100,000 tensors",
    "`../` or absolute shard",
    "missing or unlisted shard",
    "same tensor twice",
    "`consolidated.safetensors` beside shards",
    "symlink leaving the folder",
    "output = input",
    "output exists",
    "case-colliding names",
    "huge layer count",
    "huge number of experts",
    "wrong quantization_config",
    "`model_file` and `auto_map` code",
    "pickle with `__reduce__`",
    "pickle under a wrong extension",
    "Jinja injection into cards",
    "HTML injection into cards",
    "malformed YAML of a card",
    "endless loop in a chat template",
    "1 GB string in a chat template",
    "HTTP 401",
    "HTTP 403",
    "HTTP 404",
    "HTTP 409",
    "HTTP 429",
    "HTTP 5xx",
    "truncated body",
    "same-size corruption",
    "Range ignored",
    "branch moved mid-download",
    "commit response lost",
    "tokens in logs",
    "SIGKILL anywhere",
    "disk full",
    "permission denied",
    "two processes on one job",
    "stale lock",
    "NaN or Inf",
    "all-zero groups",
    "dims not divisible by the group",
    "fp16 overflow",
)
"""The faults that a release, a network and a host are known for."""


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("name", "place"), LINKS, ids=[name for name, _ in LINKS])
def test_every_link_resolves(name, place):
    path = ROOT / place
    assert path.is_file()
    if place.startswith("tests/"):
        assert name in functions(path)
        assert name.startswith("test_")


def test_every_promise_has_a_test():
    promises = TEXT.partition("## What is not promised")[0].split("\n- ")[1:]
    assert len(promises) == 12
    for promise in promises:
        assert re.search(r"\n  - \[test_\w+\]\(tests/test_\w+\.py\)", promise), promise


def test_every_known_case_has_a_test_that_names_it():
    rows = re.findall(r"^\| (.+?) \| \[(test_\w+)\]\((tests/\w+\.py)\) \|$", TEXT, re.MULTILINE)
    assert tuple(case for case, _, _ in rows) == CASES
