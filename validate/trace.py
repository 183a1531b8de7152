"""A stock runtime's loader run on headers alone: what it makes of every tensor, symbolically.

The loader itself runs, unmodified, at the release's full size; MLX records what it does to the
arrays and nothing is computed. So its renaming, stacking and rescaling become expressions of the
rule language, and the judgement of its strict loading holds without a weight being read.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from unittest.mock import patch

from arch_maps.ops import Shape, Source
from validate.lowering import Lowering, Opaque, Recorder, Value, settled
from validate.runtime import MlxRuntime, RuntimeRefusal, prepare_mlx, runtimes_for
from validate.unfilled import unfilled

_MLX: Final = {
    "F64": "float32",  # MLX reads no float64
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool_",
    "F8_E4M3": "uint8",  # the runtimes read the bytes of 8-bit floats
    "F8_E5M2": "uint8",
    "F8_E8M0": "uint8",
}
_LISTED: Final = 4
Headers = Mapping[str, tuple[str, Shape]]
"""safetensors dtype code and shape by tensor name."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the runtime's model: what the loader fills it with, and what owns it."""

    value: Value
    dtype: str
    """MLX's name of the type it is loaded with."""
    module: str
    """Class of the module that it belongs to."""
    quantizable: bool
    """Whether that module has a quantized form."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A loader's whole work on one release."""

    runtime: str
    version: str
    parameters: Mapping[str, Parameter]
    unused: tuple[str, ...]
    """Tensors that the loader takes and leaves out of the model."""

    def problems(self) -> list[str]:
        """The parameters that the rule language cannot say, one line for each."""
        return [
            f"{path}: the loader of {self.title} does more than move and scale weights: "
            f"{parameter.value.why}"
            for path, parameter in self.parameters.items()
            if isinstance(parameter.value, Opaque)
        ]

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.runtime.replace('_', '-')} {self.version}"


def trace_loader(
    config: Mapping[str, Any],
    tensors: Headers,
    *,
    runtime: str,
    model_file: Path | None = None,
) -> Traced:
    """Run the loader of ``runtime`` on these headers; RuntimeRefusal where it does not take them.

    The refusal has the runtime's own words: a missing or surplus parameter, a wrong shape, or an
    operation that needs values. ``model_file`` is the code that the config names as its model.
    """

    _import_models(config, model_file)

    def load(folder: Path) -> Any:
        return MlxRuntime.load(
            folder, runtime=runtime, trust_remote_code=model_file is not None, lazy=True
        ).model

    return _trace(load, config, tensors, runtime=runtime, model_file=model_file)


@contextlib.contextmanager
def planned_model(
    config: Mapping[str, Any],
    tensors: Headers,
    *,
    runtime: str,
    model_file: Path | None = None,
) -> Iterator[Any]:
    """The model that ``runtime`` would load from a checkpoint with these headers, without values.

    Nothing is computed while the block runs: calling the model tells shapes, and what it refuses.
    RuntimeRefusal in the runtime's own words.
    """
    prepare_mlx()
    import mlx.core as mx

    _import_models(config, model_file)
    arrays = {
        name: mx.zeros(shape, getattr(mx, _MLX[code])) for name, (code, shape) in tensors.items()
    }
    with _folder(config, sorted(arrays), model_file) as folder, _reading(arrays):
        yield MlxRuntime.load(
            folder, runtime=runtime, trust_remote_code=model_file is not None, lazy=True
        ).model


def trace_drafter(config: Mapping[str, Any], tensors: Headers) -> tuple[Traced, dict[str, Any]]:
    """The drafter that mlx-vlm takes out of a release itself, and its config, from headers alone.

    RuntimeRefusal where mlx-vlm has no drafter for the type or finds no such layers.
    """
    prepare_mlx()
    from mlx.utils import tree_flatten

    mtp_split: Any = import_module("mlx_vlm.speculative.drafters.mtp_split")
    model_type = str(config.get("model_type"))
    splitter = mtp_split.get_mtp_splitter(source_config=dict(config)) or mtp_split.get_mtp_splitter(
        model_type.removesuffix("_text")
    )
    if splitter is None:
        raise RuntimeRefusal(f"mlx-vlm has no drafter for further-token layers of {model_type!r}")
    with contextlib.suppress(ImportError):
        import_module(f"mlx_vlm.speculative.drafters.{splitter.output_model_type}")
    text = splitter.read_text_config(dict(config))
    own = {name: header for name, header in tensors.items() if splitter.select_keys(name, text)}
    if not own:
        raise RuntimeRefusal(f"the release has no further-token layers of {model_type!r}")
    made: dict[str, Any] = {}

    def load(folder: Path) -> Any:
        with patch.object(mtp_split, "safe_open", _NoWeights):
            drafted, weights = splitter.prepare(folder, source_config=dict(config))
        made.update(drafted)
        package, _ = mtp_split.get_model_and_args(drafted)
        if not hasattr(package, "Model"):
            raise RuntimeRefusal(f"mlx-vlm splits {model_type!r} and cannot load what it splits")
        model = package.Model(package.ModelConfig.from_dict(drafted))
        empty = dict(tree_flatten(model.parameters()))
        # Copies of the model's own tables have no place in the drafter, which reads the model's.
        known = {name: array for name, array in weights.items() if name in empty}
        for name, array in known.items():
            if array.shape != empty[name].shape:
                raise RuntimeRefusal(
                    f"mlx-vlm's drafter has {name} of {empty[name].shape}, the release makes it "
                    f"{array.shape}"
                )
        return mtp_split.load_model_weights(model, drafted, known, folder, lazy=True, strict=False)

    return _trace(load, config, own, runtime="mlx_vlm", model_file=None), made


class _NoWeights:
    """A safetensors file that says it is torch's and leaves its tensors to ``mx.load``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _NoWeights:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def metadata(self) -> dict[str, str]:
        """The format that torch releases state."""
        return {"format": "pt"}

    def keys(self) -> list[str]:
        """No names: the index has told them already."""
        return []

    def get_tensor(self, name: str) -> Any:
        """No tensor: the callers then fall back to ``mx.load``."""
        raise RuntimeError(name)


def _trace(
    loader: Callable[[Path], Any],
    config: Mapping[str, Any],
    tensors: Headers,
    *,
    runtime: str,
    model_file: Path | None,
) -> Traced:
    prepare_mlx()
    import mlx.core as mx
    from mlx.utils import tree_flatten

    names = sorted(tensors)
    leaves = [Source(name, tensors[name][1]) for name in names]
    arrays = [
        mx.zeros(shape, getattr(mx, _MLX[code])) for code, shape in (tensors[n] for n in names)
    ]
    recorder = Recorder()
    found: dict[str, Any] = {}

    def load(*inputs: Any) -> list[Any]:
        weights = dict(zip(names, inputs, strict=True))
        with _folder(config, names, model_file) as folder, _reading(weights):
            model = loader(folder)
        found.update(tree_flatten(model.parameters()))
        found[""] = model
        return [found[path] for path in found if path]

    try:
        mx.export_function(recorder, load, *arrays)
    except RuntimeRefusal as refusal:
        raise RuntimeRefusal(_shortened(str(refusal))) from refusal
    except Exception as error:  # whatever the loader raises is its word on the release
        why = _shortened(f"{type(error).__name__}: {error}")
        raise RuntimeRefusal(f"{runtime}: its loader cannot be followed: {why}") from error
    model = found.pop("")
    return _traced(recorder, leaves, list(found), model, runtime)


def reload_problems(
    config: Mapping[str, Any],
    tensors: Headers,
    *,
    runtime: str,
    text_only: bool = False,
    model_file: Path | None = None,
    alike: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """What the loader would change in, or miss from, a checkpoint with these headers.

    An empty list proves, for weights of any value, that they are loaded as they are written.
    ``text_only`` allows tensors outside the language model to stay unread; ``alike`` maps tensors
    that are written twice, with the same content, to one of their names.
    """
    try:
        traced = trace_loader(config, tensors, runtime=runtime, model_file=model_file)
    except RuntimeRefusal as refusal:
        return [str(refusal)]
    content = {_stem(name): _stem(same) for name, same in alike.items()}
    twice = {content.get(_stem(name), _stem(name)) for name in tensors if name in alike}
    known = {_stem(name) for name in tensors}
    problems = []
    for path, parameter in traced.parameters.items():
        value = parameter.value
        if not isinstance(value, Source):
            problems.append(f"{path}: {traced.title} changes it again when it loads it")
            continue
        code = tensors[value.name][0]
        here, there = _stem(path), _stem(value.name)
        if here not in known:
            problems.append(f"{path}: no tensor is written for it, {traced.title} takes {there}")
        elif content.get(here, here) != content.get(there, there):
            problems.append(f"{path}: {traced.title} fills it with {value.name}")
        elif _MLX[code] != parameter.dtype.replace("bool", "bool_"):
            problems.append(f"{path}: written as {code}, loaded as {parameter.dtype}")
    problems += [
        f"{name}: {traced.title} reads it and leaves it out"
        for name in traced.unused
        if not (text_only and not name.startswith(("language_model.", "lm_head.")))
        and content.get(_stem(name), _stem(name)) not in twice
    ]
    return problems


def _shortened(text: str) -> str:
    """A refusal with the first few of the tensors that it lists."""
    head, *rest = " ".join(text.split()).split(", ")
    more = len(rest) - _LISTED
    return ", ".join([head, *rest[:_LISTED]]) + (f" and {more} more" if more > 0 else "")


def _stem(path: str) -> str:
    return path.removeprefix("language_model.")


def _traced(
    recorder: Recorder, leaves: list[Source], paths: list[str], model: Any, runtime: str
) -> Traced:
    lowering = Lowering(recorder, leaves)
    owners = dict(model.named_modules())
    parameters = {}
    used: set[str] = set()
    reach = _reach(recorder, leaves)
    for path, (name, _, dtype) in zip(paths, recorder.outputs, strict=True):
        value = settled(lowering.value(name))
        used |= reach(name)
        owner = owners.get(path.rpartition(".")[0], model)
        parameters[path] = Parameter(
            value, dtype, type(owner).__name__, hasattr(owner, "to_quantized")
        )
    distribution = runtime.replace("_", "-")
    return Traced(
        runtime=runtime,
        version=version(distribution),
        parameters=parameters,
        unused=tuple(leaf.name for leaf in leaves if leaf.name not in used),
    )


def _reach(recorder: Recorder, leaves: list[Source]) -> Callable[[str], set[str]]:
    """For a value's name: the source tensors that the recorded primitives made it from."""
    named = dict(zip(recorder.inputs, (leaf.name for leaf in leaves), strict=True))
    seen: set[str] = set()

    def reach(name: str) -> set[str]:
        waiting, sources = [name], set()
        while waiting:
            top = waiting.pop()
            if top in named:
                sources.add(named[top])
            elif top not in seen and top in recorder.primitives:
                seen.add(top)
                entry, _ = recorder.primitives[top]
                waiting += [n for n, _, _ in entry["inputs"]]
        return sources

    return reach


def _import_models(config: Mapping[str, Any], model_file: Path | None) -> None:
    """Import what the loaders will, before anything of MLX is replaced for their run.

    A module that is first imported then could keep the replacement for good.
    """
    runtimes_for(config)
    if model_file is not None:
        with contextlib.suppress(Exception):  # the loader's own attempt is the one to report
            exec(compile(model_file.read_text(), str(model_file), "exec"), {"__name__": "custom"})


@contextlib.contextmanager
def _folder(config: Mapping[str, Any], names: list[str], model_file: Path | None) -> Iterator[Path]:
    """What the loaders look for beside the weights."""
    weights = "model.safetensors"
    with tempfile.TemporaryDirectory(prefix="loader-") as place:
        folder = Path(place) / "the release"  # as refusals call it
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / weights).touch()
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, weights)}
        (folder / f"{weights}.index.json").write_text(json.dumps(index), encoding="utf-8")
        if model_file is not None:
            (folder / config["model_file"]).write_bytes(model_file.read_bytes())
        yield folder


@contextlib.contextmanager
def _reading(weights: dict[str, Any]) -> Iterator[None]:
    """Hand ``weights`` to whatever reads a file, and let nothing be computed early.

    Loaders evaluate between steps to bound their memory, and copy to make arrays contiguous;
    neither changes a value.
    """
    mx: Any = import_module("mlx.core")
    with (
        unfilled(),
        patch.object(mx, "load", lambda *_, **__: dict(weights)),
        patch.object(mx, "eval", lambda *_, **__: None),
        patch.object(mx, "async_eval", lambda *_, **__: None),
        patch.object(mx, "contiguous", lambda x, *_, **__: x),
    ):
        yield
