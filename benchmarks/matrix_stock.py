"""The stock converter's tensors beside ours, where no torch class can judge either."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from arch_maps.registry import map_name
from validate.loaded import Written, compare_loaded, written_tensors
from validate.runtime import MlxRuntime, RuntimeRefusal

EQUAL = "equal bit for bit"
_SHOWN = 3


def run_stock(source: Path, out: Path, *, runtime: str) -> None:
    """Convert with the runtime's own converter, silently; raises whatever it raises."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert: Any = import_module(f"{runtime}.convert")
        convert.convert(hf_path=str(source), mlx_path=str(out))


def under_own_name(source: Path, place: Path) -> Path | None:
    """The release with the model_type that the runtime calls it by, where its own is another.

    Some releases share the model_type of another architecture, and the runtime takes them for it.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = map_name(config)
    if name == config["model_type"]:
        return None
    place.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (place / path.name).hardlink_to(path)
    (place / "config.json").write_text(json.dumps({**config, "model_type": name}))
    return place


def tensors_equal(ours: Path, stock: Path) -> str:
    """``equal bit for bit``, or how the two checkpoints' tensors differ, by name.

    The prefix of the language model is left aside: the runtimes add it themselves.
    """
    mine, theirs = _by_name(ours), _by_name(stock)
    differ = [f"{name} only in ours" for name in sorted(mine.keys() - theirs.keys())]
    differ += [f"{name} only in stock" for name in sorted(theirs.keys() - mine.keys())]
    differ += [
        f"{name}: {words}"
        for name in sorted(mine.keys() & theirs.keys())
        if (words := _difference(mine[name], theirs[name]))
    ]
    return _worded(differ, len(mine))


def loaded_equal(ours: Path, source: Path, *, runtime: str) -> str:
    """The same of what the runtime's loader alone makes of the release, without its converter."""
    try:
        model = MlxRuntime.load(source, runtime=runtime)
    except RuntimeRefusal as error:
        return f"does not load: {error}"
    found = compare_loaded(ours, model.parameters())
    return _worded(list(found.problems), found.tensors)


def _worded(differ: list[str], count: int) -> str:
    if not differ:
        return EQUAL
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    return f"{len(differ)} of {count} differ: {'; '.join(differ[:_SHOWN])}{more}"


def _by_name(folder: Path) -> dict[str, Written]:
    return {
        name.removeprefix("language_model."): tensor
        for name, tensor in written_tensors(folder).items()
    }


def _difference(ours: Written, stock: Written) -> str:
    if ours.dtype != stock.dtype or ours.shape != stock.shape:
        return (
            f"{ours.dtype} {list(ours.shape)} in ours, {stock.dtype} {list(stock.shape)} in stock"
        )
    different = int(np.count_nonzero(ours.bits() != stock.bits()))
    return f"{different} values differ" if different else ""
