"""The Gemma 4 drafter: converted rightly by itself, and the same greedy text beside its model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arch_maps.ops import Source
from arch_maps.rules import Kind, Rule
from converter.execute.encode import BadValueError, encode
from converter.plan.model import Output
from validate.parity import run_parity
from validate.runtime import prepare_mlx
from validate.speculative import judge_drafter

prepare_mlx()
ORDER = "masked_embedding.token_ordering"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """(twin, conversion) of the drafter and of a model that it fits."""
    from converter.pipeline import Request, convert
    from converter.ui import Console
    from validate.twin import load_example, make_twin

    root = tmp_path_factory.mktemp("assistant")
    made = {}
    for name in ("gemma4_assistant", "gemma4"):
        twin = make_twin(load_example(name), root / name).path
        out = root / f"{name}-mlx"
        convert(Request(hf_path=str(twin), mlx_path=out), Console(quiet=True))
        made[name] = (twin, out)
    return made


def failed(twin: Path, mlx: Path) -> set[str]:
    report = run_parity(source=twin, mlx_path=mlx, plan=None)
    assert report.verdict == ("fail" if any(c.verdict == "fail" for c in report.checks) else "pass")
    return {check.name for check in report.checks if check.verdict == "fail"}


def changed(mlx: Path, to: Path, name: str, change) -> Path:
    shutil.copytree(mlx, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, to / "model.safetensors", metadata={"format": "mlx"})
    return to


def test_the_drafter_computes_what_torch_computes(pair) -> None:
    twin, mlx = pair["gemma4_assistant"]
    assert failed(twin, mlx) == set()
    order = load_file(mlx / "model.safetensors")[ORDER]
    assert order.dtype == np.int32
    assert sorted(order) == list(range(len(order)))


@pytest.mark.parametrize(
    "name", [ORDER, "pre_projection.weight", "masked_embedding.centroids.weight"]
)
def test_a_wrong_weight_of_the_drafter_fails(pair, tmp_path: Path, name: str) -> None:
    twin, mlx = pair["gemma4_assistant"]
    broken = changed(mlx, tmp_path / "mlx", name, lambda value: value[::-1])
    assert "logits" in failed(twin, broken)


@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
def test_greedy_text_is_the_same_with_the_drafter_and_without(pair) -> None:
    report = judge_drafter(pair["gemma4_assistant"][1], target=pair["gemma4"][1], plan=None)
    rows = {check.name: check for check in report.checks}
    assert rows["drafted"].verdict == rows["weights"].verdict == "pass"
    assert rows["drafted"].value == 0
    assert rows["drafted"].metrics["rounds"] > 20


def test_integers_that_mlx_cannot_index_with_are_refused() -> None:
    rule = Rule("table", Source("table", (2,)), Kind.INDEX, "text")
    out = Output(rule, "I32", None, {})
    with pytest.raises(BadValueError, match="table holds integers beyond int32"):
        list(encode(out, np.array([1, 2**40]), 0))
