"""Imports point one way, and the command line stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "arch_maps": set(),
    "quant": {"arch_maps"},
    "validate": {"arch_maps", "quant"},
    "model_cards": {"arch_maps", "quant", "validate"},
    "converter": {"arch_maps", "quant", "validate", "model_cards"},
}
HEAVY = (
    *("torch", "transformers", "accelerate", "tokenizers", "huggingface_hub"),
    *("mlx", "mlx_lm", "mlx_vlm", "numba", "fastapi", "uvicorn", "rich", "PIL", "plotly"),
)


def imported(text: str, package: str = "") -> set[str]:
    """Full names of the modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], base]).rstrip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _is_import_call(node):
            names |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def _is_import_call(node: ast.Call) -> bool:
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in ("import_module", "__import__")


@pytest.mark.parametrize("top", ALLOWED)
def test_imports_point_one_way(top):
    files = sorted((ROOT / top).rglob("*.py"))
    assert files
    wrong = []
    for file in files:
        package = ".".join(file.relative_to(ROOT).parent.parts)
        for name in imported(file.read_text(), package):
            other = name.partition(".")[0]
            if other in ALLOWED and other != top and other not in ALLOWED[top]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_product_code_imports_tests():
    for top in ALLOWED:
        for file in (ROOT / top).rglob("*.py"):
            names = {name.partition(".")[0] for name in imported(file.read_text())}
            assert not names & {"tests", "conftest", "pytest", "hypothesis"}, file


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import converter.plan", "converter.plan"),
        ("def f():\n    from converter.plan import Plan", "converter.plan"),
        ("from . import errors", "validate.twin.errors"),
        ("from ..runtime import x", "validate.runtime"),
        ("import importlib\nimportlib.import_module('torch.nn')", "torch.nn"),
    ],
)
def test_every_way_to_import_is_seen(text, found):
    assert found in imported(text, "validate.twin")


@pytest.mark.parametrize(
    "modules",
    [
        ["converter.cli"],
        ["converter.plan", "converter.release"],
        ["arch_maps.registry"],
        ["quant.recipe", "quant.weights", "quant.mixed"],
        ["validate", "validate.report", "validate.twin", "validate.runtime"],
        ["model_cards"],
    ],
    ids=lambda names: names[0],
)
def test_heavy_modules_wait_until_they_are_needed(modules):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_expanding_every_map_needs_none_of_them():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from arch_maps.registry import *; "
        "assert all(find(name) for name in model_types()); "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_kernels_start_without_what_numba_only_probes_for_and_take_it_from_nobody():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from quant.recipe import QuantSpec
from quant.weights import quantize_rows
quantize_rows(np.ones((1, 64), np.float32), QuantSpec.make("affine", 4))
print(*[name for name in ("scipy", "cffi", "pycparser") if name in sys.modules])
import scipy.linalg
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
