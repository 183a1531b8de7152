"""A transformers model without weights, and the release's tensors for any part of it.

Names and layouts go through transformers' own conversion for the release (what ``from_pretrained``
applies), so which parameter a tensor ends up in is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arch_maps.ops import RowReader
from quant.calibrate.text import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The release's model class on the meta device, in float32; raises CalibrationError.

    Buffers that no file holds (rotary frequencies and the like) are real. Experts multiply one
    after another.
    """
    import torch
    import transformers

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}

    def build() -> Any:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        config._experts_implementation = "eager"
        return _model_class(config)(config, dtype=torch.float32)

    return without_weights(build, folder)


def without_weights(build: Callable[[], Any], folder: Path) -> Any:
    """The transformers model that ``build`` makes of ``folder``, its parameters on the meta device.

    Raises CalibrationError where that fails.
    """
    import torch

    init: Any = import_module("transformers.initialization")
    try:
        with torch.device("meta"), init.meta_device_safe_creation_ops(), init.no_tie_weights():
            model = build()
        model._move_missing_keys_from_meta_to_device(set(), None, None, None)
        model._initialize_missing_keys(False)
    except CalibrationError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise CalibrationError(f"{folder}: transformers cannot build it: {error}") from error
    return model.eval()


def _model_class(config: Any) -> Callable[..., Any]:
    import transformers

    found = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if found is not None:
        return found._from_config  # type: ignore[no-any-return]
    auto: Any = (
        transformers.AutoModelForImageTextToText
        if hasattr(config, "vision_config")
        else transformers.AutoModelForCausalLM
    )
    return auto.from_config  # type: ignore[no-any-return]


def _adds_rows(converter: Any) -> bool:
    """Whether what transformers makes of tensors is their rows, one tensor's after another's."""
    loading: Any = import_module("transformers.core_model_loading")
    operations = converter.operations
    return (
        len(operations) == len(converter.source_patterns) == len(converter.target_patterns) == 1
        and type(operations[0]) is loading.Concatenate
        and operations[0].dim == 0
    )


@dataclass(frozen=True)
class Group:
    """Tensors of the release that become one or more parameters together."""

    sources: tuple[tuple[str, str], ...]
    """Pattern that matched and name, in the order in which transformers collects them."""
    first: str
    converter: Any
    """None where the tensor is the parameter."""
    parameters: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(name for _, name in self.sources)


class Weights:
    """The release's tensors as parameters of a model; ``reader`` gives their values."""

    def __init__(self, model: Any, reader: RowReader, shapes: Shapes) -> None:
        """Group the names of ``shapes`` by parameter; raises CalibrationError for a misfit."""
        self._model = model
        self._reader = reader
        self._shapes = shapes
        self._config = model.config
        self.names = set(model.state_dict())
        """All parameters and stored buffers of the model."""
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        """Parameters that share another's values, by name."""
        self.replaced: Mapping[str, Tensor] = {}
        """Values that stand in for tensors of the release from now on."""
        self.rounding: Any = None
        """torch dtype that the values of parameters are rounded to before they are used."""
        self.groups = self._grouped()
        self.group_of = {name: group for group in self.groups for name in group.parameters}

    def _grouped(self) -> list[Group]:
        import torch

        loading: Any = import_module("transformers.core_model_loading")
        mapping: Any = import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        expected = dict.fromkeys(self.names, True)
        prefix = self._model.base_model_prefix
        collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for name in sorted(self._shapes, key=loading.dot_natural_key):
            target, pattern = loading.rename_source_key(
                name, renamings, converters, prefix, expected
            )
            if target not in expected and name in expected:
                target, pattern = loading.rename_source_key(name, [], [], prefix, expected)
            if target in expected:
                converter = of_pattern[pattern] if pattern is not None else None
                collected.setdefault(target, (converter, []))[1].append((pattern or name, name))
        groups = []
        for first, (converter, sources) in collected.items():
            group = Group(tuple(sources), first, converter, (first,))
            if converter is not None:
                values = {n: torch.empty(self._shapes[n], device="meta") for n in group.names}
                made = tuple(self.convert(group, values))
                group = Group(group.sources, first, converter, made)
            groups.append(group)
        return groups

    def convert(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that ``values``, by tensor name, become."""
        if group.converter is None:
            return {group.first: values[group.names[0]]}
        converter = deepcopy(group.converter)
        for pattern, name in group.sources:
            converter.add_tensor(group.first, name, pattern, lambda name=name: values[name])
        made = converter.convert(group.first, model=self._model, config=self._config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}

    def read(self, name: str) -> Tensor:
        """A tensor of the release in float32; integers keep their type."""
        if name in self.replaced:
            return self.replaced[name]
        shape = self._shapes[name]
        return self.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor of the release, as ``read`` gives them."""
        import torch

        array = self._reader.read_rows(name, start, stop)
        if array.dtype.kind != "i":
            array = array.astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(array))

    def rows_of(self, parameter: str) -> Callable[[int, int], Tensor] | None:
        """What reads rows of a parameter alone; None unless tensors of the release make it so.

        These are one tensor, or several whose rows follow one another.
        """
        group = self.group_of.get(self.tied.get(parameter, parameter))
        if group is None or not (group.converter is None or _adds_rows(group.converter)):
            return None
        names = group.names if group.converter is not None else group.names[:1]
        if any(name in self.replaced for name in names):
            return None
        ends = list(accumulate(self._shapes[name][0] for name in names))

        def rows(start: int, stop: int) -> Tensor:
            import torch

            pieces = []
            for name, end in zip(names, ends, strict=True):
                first = end - self._shapes[name][0]
                if start < end and stop > first:
                    low, high = max(start, first) - first, min(stop, end) - first
                    pieces.append(self.read_rows(name, low, high))
            found = torch.cat(pieces) if pieces else self.read_rows(names[0], 0, 0)
            return self.rounded(found)

        return rows

    def rounded(self, value: Tensor) -> Tensor:
        """A parameter's value with the rounding that is asked for, in its own dtype."""
        return value if self.rounding is None else value.to(self.rounding).to(value.dtype)

    def load(self, parameters: Iterable[str], changed: Mapping[str, Tensor] | None = None) -> None:
        """Give values to parameters that have none; ``changed`` replaces tensors by name.

        Raises CalibrationError where the release has none for a parameter.
        """
        wanted = {self.tied.get(name, name) for name in parameters}
        done: set[int] = set()
        for name in sorted(wanted):
            group = self.group_of.get(name)
            if group is None:
                raise CalibrationError(f"{name}: the release has no tensor for this parameter")
            if id(group) in done:
                continue
            done.add(id(group))
            values = {
                n: changed[n] if changed and n in changed else self.read(n) for n in group.names
            }
            for parameter, value in self.convert(group, values).items():
                self._assign(parameter, value)

    def _assign(self, parameter: str, value: Tensor) -> None:
        import torch

        old = self._model.get_parameter_or_buffer(parameter)
        if tuple(old.shape) != tuple(value.shape):
            raise CalibrationError(
                f"{parameter}: {type(self._model).__name__} wants {list(old.shape)}, "
                f"the release has {list(value.shape)}"
            )
        held: Tensor = value.to(old.dtype).contiguous()
        if isinstance(old, torch.nn.Parameter):
            held = torch.nn.Parameter(self.rounded(held), requires_grad=False)
        self.put(parameter, held)

    def value(self, parameter: str) -> Tensor:
        """A parameter as it is held now."""
        found: Tensor = self._model.get_parameter_or_buffer(parameter)
        return found

    def put(self, parameter: str, held: Tensor) -> None:
        """Let a parameter, and those tied to it, be this very tensor."""
        for name in (parameter, *(n for n, source in self.tied.items() if source == parameter)):
            owner, leaf = self._place(name)
            kept = owner._parameters if leaf in owner._parameters else owner._buffers
            kept[leaf] = held

    def release(self, parameters: Sequence[str]) -> None:
        """Take the values of parameters away again."""
        for name in parameters:
            owner, leaf = self._place(name)
            if leaf in owner._parameters:
                owner._parameters[leaf] = _meta(owner._parameters[leaf])

    def _place(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path), leaf


def _meta(parameter: Any) -> Any:
    import torch

    return torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False)
