"""Kernels as object files: found again without numba, and never where anything differs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quant import objects
from quant.compiled import Compiled, jit

ROOT = Path(__file__).parents[1]


def kernel(factor: int, step: int = 3) -> Compiled:
    @jit
    def shifted(x: int) -> int:
        return x + step

    def scaled(values: np.ndarray, size: np.float32, out: np.ndarray) -> int:
        for i in range(values.shape[0]):
            out[i] = shifted(values[i, 0]) * factor * size
        return values.shape[0]

    return Compiled(scaled)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_folders", lambda: iter([tmp_path]))
    return tmp_path


def run(made: Compiled, values: np.ndarray) -> list[float]:
    out = np.empty(len(values), np.float32)
    assert made(values, np.float32(0.5), out) == len(values)
    return out.tolist()


def test_found_again_only_for_the_same_code_constants_and_types(folder, monkeypatch):
    values = np.array([[1, 9], [2, 9]])

    def files() -> int:
        return len(list(folder.iterdir()))

    assert run(kernel(2), values) == [4, 5]
    assert files() == 1
    with monkeypatch.context() as patch:
        patch.setattr("quant.compiled._compile", None)  # cannot be called
        assert run(kernel(2), values) == [4, 5]
    assert run(kernel(4), values) == [8, 10]  # another constant of its own
    assert files() == 2
    assert run(kernel(2), values.astype(np.int32)) == [4, 5]
    assert files() == 3
    assert run(kernel(2, step=5), values) == [6, 7]  # a constant of what it calls
    assert files() == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],
        lambda b: b[:-1] + b"x",
        lambda b: b"{}",
        lambda b: b.replace(b'"symbol": "', b'"symbol": "x', 1),
        lambda b: b.replace(b'"returns": "', b'"returns": "x', 1),
    ],
)
def test_damaged_object_file_is_made_anew(folder, damage, monkeypatch):
    assert run(kernel(6), np.array([[1, 0]])) == [12]
    [path] = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert run(kernel(6), np.array([[1, 0]])) == [12]
    assert [path] == list(folder.iterdir())
    monkeypatch.setattr("quant.compiled._compile", None)
    assert run(kernel(6), np.array([[1, 0]])) == [12]


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_object_file_that_others_could_write_is_not_run(folder, mode, monkeypatch):
    assert run(kernel(6), np.array([[1, 0]])) == [12]
    [path] = folder.iterdir()
    path.chmod(mode)
    with monkeypatch.context() as patch:
        patch.setattr("quant.compiled._compile", lambda *_: pytest.fail("made anew"))
        with pytest.raises(pytest.fail.Exception, match="made anew"):
            run(kernel(6), np.array([[1, 0]]))
    assert run(kernel(6), np.array([[1, 0]])) == [12]
    assert path.stat().st_mode & 0o777 == 0o644


def test_older_code_of_the_same_kernel_is_dropped(folder):
    """And nothing else: neither what other settings made of it, nor what is being written."""
    values = np.array([[1, 9], [2, 9]])
    assert run(kernel(2), values) == [4, 5]
    assert run(kernel(4), values) == [8, 10]
    assert run(kernel(2), values.astype(np.int32)) == [4, 5]
    before = set(folder.iterdir())
    draft = folder / f"{min(before).name}abc"
    draft.touch()

    def newer(factor: int, step: int) -> Compiled:
        @jit
        def shifted(x: int) -> int:
            return x - step

        def scaled(values: np.ndarray, size: np.float32, out: np.ndarray) -> int:
            for i in range(values.shape[0]):
                out[i] = shifted(values[i, 0]) * factor * size
            return values.shape[0]

        scaled.__qualname__ = kernel(2).function.__qualname__
        return Compiled(scaled)

    assert run(newer(2, 3), values) == [-2, -1]
    after = set(folder.iterdir()) - {draft}
    assert draft.exists()
    assert len(after) == len(before) == 3
    assert len(after & before) == 2
    assert run(kernel(4), values) == [8, 10]
    assert run(kernel(2), values.astype(np.int32)) == [4, 5]
    assert set(folder.iterdir()) - {draft} == after


def test_works_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(objects, "_folders", lambda: iter([tmp_path / "file"]))
    assert run(kernel(8), np.array([[1, 0]])) == [16]


def test_numbers_go_in_and_out_as_they_are(folder):
    @jit
    def half(values: np.ndarray, yes: bool) -> float:
        return values[0] / 2 if yes else -0.1

    @jit
    def positive(values: np.ndarray) -> bool:
        return values[0] > 0

    @jit
    def nothing(values: np.ndarray) -> None:
        values[0] = 1

    assert [half(np.array([3.0]), yes) for yes in (True, False)] == [1.5, -0.1]
    assert [positive(np.array([x])) for x in (2.0, -2.0)] == [True, False]
    assert nothing(np.array([3.0])) is None


def test_arrays_must_be_contiguous(folder):
    with pytest.raises(AssertionError, match="contiguous"):
        run(kernel(2), np.zeros((2, 4), np.int64)[:, ::2])


def test_second_process_needs_no_numba():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from quant.recipe import QuantSpec
from quant.weights import quantize_rows
quantize_rows(np.ones((1, 64), np.float32), QuantSpec.make("affine", 4))
print("numba" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
