"""What a model hands one of its blocks: hidden states, settings, and containers they share.

A container is a mapping that blocks write to for blocks after them, such as the keys and values
that the last layers of Gemma 4 read from earlier ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor

_HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call of a block; the hidden states are the first of them."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def hidden(self) -> Any:
        """The hidden states."""
        return self.positional[0] if self.positional else self.named[_HIDDEN]

    def with_hidden(self, hidden: Any) -> Call:
        """The same with other hidden states."""
        if self.positional:
            return Call((hidden, *self.positional[1:]), self.named)
        return Call((), {**self.named, _HIDDEN: hidden})

    def settings(self) -> Call:
        """The same without hidden states, and with containers as they are now."""
        return self.with_hidden(None)._each(_held)

    def copied(self) -> Self:
        """In copies that gradients can pass: inference mode's own tensors cannot."""
        return self._each(usable)

    def unknown(self) -> str | None:
        """The type of an argument that ``copied`` would share, although a block may change it."""
        return next((found for v in self._values() if (found := _unknown(v))), None)

    def containers(self) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
        """Each container by the name of its argument."""
        for name, value in (*enumerate(self.positional), *sorted(self.named.items())):
            if isinstance(value, MutableMapping):
                yield str(name), value

    def shared(self) -> dict[str, Tensor]:
        """The tensors in containers, by argument, key and, where a key has several, number."""
        found: dict[str, Tensor] = {}
        for name, container in self.containers():
            for key, held in container.items():
                each = {f"/{i}": t for i, t in enumerate(held)} if _several(held) else {"": held}
                found |= {f"{name}/{key}{end}": tensor for end, tensor in each.items()}
        return found

    def share(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what ``shared`` gave into the containers."""
        containers = dict(self.containers())
        several: dict[tuple[str, str], dict[int, Tensor]] = {}
        for label, tensor in tensors.items():  # in any order: a file sorts by type and name
            name, key, *number = label.split("/")
            if number:
                several.setdefault((name, key), {})[int(number[0])] = tensor
            else:
                containers[name][key] = tensor
        for (name, key), each in several.items():
            containers[name][key] = tuple(tensor for _, tensor in sorted(each.items()))

    def _values(self) -> Iterator[Any]:
        yield from self.positional
        yield from self.named.values()

    def _each(self, change: Any) -> Self:
        return type(self)(
            tuple(map(change, self.positional)),
            {name: change(value) for name, value in self.named.items()},
        )


def usable(value: Any) -> Any:
    """A copy of tensors, at any depth, that gradients can pass."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(usable(item) for item in value)
    if isinstance(value, MutableMapping):
        found = copy.copy(value)
        for key, item in value.items():
            found[key] = usable(item)
        return found
    return value


def first(out: Any) -> Any:
    """The hidden states among what a block answers."""
    return out[0] if isinstance(out, tuple) else out


def _held(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping) else value


def _several(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _unknown(value: Any) -> str | None:
    import torch

    if isinstance(value, MutableMapping):
        held = [t for v in value.values() for t in (v if _several(v) else (v,))]
        named = all(isinstance(key, str) and "/" not in key for key in value)
        known = named and all(isinstance(t, torch.Tensor) for t in held)
        return None if known else type(value).__name__
    if _several(value):
        return next((found for item in value if (found := _unknown(item))), None)
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return None
    return type(value).__name__
