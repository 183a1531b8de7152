"""Releases of one quantized matrix, and their decoded views."""

import json
from types import SimpleNamespace

import numpy as np
from safetensors.torch import save_file

from converter.decode import DecodingReader, decoded
from converter.source import open_folder

LINEAR = "lin"


class MapOf:
    """Stands for a map where a scheme asks one for shapes."""

    layouts = (None,)

    def __init__(self, **shapes):
        self.shapes = shapes

    def expand(self, facts, layout):
        from arch_maps.ops import Source
        from arch_maps.rules import Kind, Rule

        rules = [
            Rule(name, Source(name, shape), Kind.LINEAR, "text")
            for name, shape in self.shapes.items()
        ]
        return SimpleNamespace(rules=rules)


def release(folder, tensors, settings, *, dtype="float32", **config):
    """A folder with these torch tensors and quantization settings."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": settings, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def view_of(folder, shape=(8, 8)):
    return decoded(open_folder(folder), arch=MapOf(**{f"{LINEAR}.weight": tuple(shape)}))


def rows_of(folder, view, name=f"{LINEAR}.weight", step=None):
    """The whole decoded tensor, read ``step`` rows at a time."""
    shape = view.source.tensors[name].shape
    step = step or max(1, shape[0])
    with open_folder(folder).open() as raw:
        reader = DecodingReader(raw, view)
        pieces = [
            reader.read_rows(name, start, min(start + step, shape[0]))
            for start in range(0, shape[0], step)
        ]
    return np.concatenate(pieces)


def stored_of(folder, view, dtype, name=f"{LINEAR}.weight", step=None):
    """MLX's stored tensors of a matrix that keeps its codes, by role."""
    spec = view.coded[name].native.spec
    shape = view.coded[name].shape
    step = step or shape[0]
    found = {}
    with open_folder(folder).open() as raw:
        reader = DecodingReader(raw, view)
        for role in spec.output_tensors(shape, dtype):
            pieces = [
                reader.read_rows(f"{name}@{role}:{dtype}", start, min(start + step, shape[0]))
                for start in range(0, shape[0], step)
            ]
            found[role] = np.concatenate(pieces)
    return found
