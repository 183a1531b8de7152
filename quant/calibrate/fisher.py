"""How much the model's output minds an error of each weight, from one backward pass.

Perturbing weights by d moves the next-token distribution by KL = d' F d / 2 to second order, with
F the Fisher information: the mean of g g' over texts whose next tokens are drawn from the model
itself, g the gradient of their log-likelihood. For a dense layer F is taken as the product of the
mean squares of its inputs and of its outputs' gradients, which is the diagonal of K-FAC (Martens
and Grosse, arXiv 1503.05671). Errors of rounding are nearly independent, so the diagonal is what
counts, and the sum estimates the mean KL of a whole recipe in nats.

Blocks run one at a time, forwards and then backwards; their inputs wait in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.ops import RowReader, Source, describe
from quant.calibrate.calls import Call, first
from quant.calibrate.links import Task
from quant.calibrate.loading import Shapes
from quant.calibrate.passes import Pass, temporary
from quant.calibrate.store import Say, Statistics, Store
from quant.calibrate.stream import StreamedModel
from quant.calibrate.text import Calibration, model_rows, tokenized
from quant.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
SEQUENCES: Final = 16
"""Sequences at most: their tokens are enough for sums over whole rows and columns."""
ROWS: Final = "rows:"
COLUMNS: Final = "columns:"
LOOKED_UP: Final = "looked_up:"
_SEED: Final = 0


def fisher(
    streamed: StreamedModel, tasks: Sequence[Task], rows: Sequence[Mapping[str, Tensor]]
) -> dict[str, Array]:
    """Row and column weights of each task's matrix, by its module with a prefix.

    ``rows:`` (out,) and ``columns:`` (in,), so that half of the sum over rows and columns of
    rows * columns * d^2 estimates the KL of an error d. An embedding has them as
    ``looked_up:rows:`` (tokens,) and ``looked_up:columns:`` (size,); a tied one has both pairs.
    Matrices that are no dense layer of the reference's, one for one, are left out. Raises
    CalibrationError where none is.
    """
    layers = _Layers(streamed, tasks)
    count = len(streamed.blocks)
    tokens = sum(int(row["input_ids"].numel()) for row in rows)
    found: dict[str, Array] = {}
    settings: list[list[Call]] = []
    with temporary("fisher-") as folder, streamed.run(rows) as run:
        states = _States(Path(folder))
        energy = sum(float(x.double().square().sum()) for x in run.inputs(0))
        for index in range(count):
            states.save(index, run.inputs(index))
            settings.append([run.call(index, row).settings() for row in range(run.count)])
            with streamed.loaded(index):
                run.forward(index, keep=True)
        last = [run.handed(row) for row in range(run.count)]
        streamed.release_rest()  # what was read in inference mode lets no gradient through
        gradients = _tail(streamed, rows, last, layers.head, found, tokens)
        shared: list[dict[str, Tensor]] = [{} for _ in rows]
        for index in reversed(range(count)):
            with streamed.loaded(index):
                watch = _Watch(layers.of_block(index))
                for row in range(len(rows)):
                    call = settings[index][row].with_hidden(states.load(index, row))
                    gradients[row] = _back(streamed, index, call, gradients[row], shared[row])
                found |= watch.close(tokens)
    if layers.table is not None:
        found |= _looked_up(streamed, layers.table, rows, gradients, energy)
    return found


class _Layers:
    """The dense layers that tasks stand for: those whose weight one tensor of the release is."""

    def __init__(self, streamed: StreamedModel, tasks: Sequence[Task]) -> None:
        from torch import nn

        self._streamed = streamed
        self.table = next((task for task in tasks if task.table), None)
        by_source = {t.expr.name: t for t in tasks if isinstance(t.expr, Source)}
        weights = streamed.weights
        self._layers: dict[str, tuple[Task, Any]] = {}
        for path, module in streamed.model.named_modules():
            name = f"{path}.weight"
            group = weights.group_of.get(weights.tied.get(name, name))
            if group is None or group.converter is not None or not isinstance(module, nn.Linear):
                continue
            if (task := by_source.get(group.names[0])) is not None:
                self._layers[path] = (task, module)
        if not self._layers:
            raise CalibrationError(
                f"none of the {len(tasks)} matrices is a dense layer of "
                f"{type(streamed.model).__name__}, so their formats cannot be chosen by "
                "activations; leave --calibration-data out"
            )

    @property
    def head(self) -> dict[str, Any]:
        """The output projection by its task's module, if it has one; the table's where tied."""
        own = self._streamed.head
        return {task.module: layer for task, layer in self._layers.values() if layer is own}

    def of_block(self, index: int) -> dict[str, Any]:
        """The dense layers of a block by their tasks' modules."""
        prefix = f"{self._streamed.path}.{index}."
        mine = (pair for path, pair in self._layers.items() if path.startswith(prefix))
        return {task.module: layer for task, layer in mine}


class _States:
    """Inputs of every block on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, index: int, hidden: Iterator[Tensor]) -> None:
        for row, state in enumerate(hidden):
            np.save(self._folder / f"{index}-{row}.npy", state.numpy())

    def load(self, index: int, row: int) -> Any:
        import torch

        return torch.from_numpy(np.load(self._folder / f"{index}-{row}.npy"))


class _Watch:
    """Sums of squares of what goes into modules, and of the gradients of what comes out."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._hooks = [m.register_forward_hook(self._hook(name)) for name, m in modules.items()]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Any, ...], out: Any) -> None:
            del module
            self._add(COLUMNS + name, given[0].detach())
            out.register_hook(lambda gradient: self._add(ROWS + name, gradient))

        return hook

    def _add(self, name: str, value: Tensor) -> None:
        import torch

        found = value.reshape(-1, value.shape[-1]).square().sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def close(self, tokens: int) -> dict[str, Array]:
        """The means over tokens, in float32."""
        for handle in self._hooks:
            handle.remove()
        return {n: (s / tokens).numpy().astype(np.float32) for n, s in self._sums.items()}


def _back(
    streamed: StreamedModel, index: int, call: Call, gradient: Tensor, shared: dict[str, Tensor]
) -> Tensor:
    """The gradient at a block's inputs, from that at its outputs.

    ``shared`` are gradients at what later blocks took from containers; what this block took is
    added, and what it put there is taken away.
    """
    import torch

    copied = call.copied()
    copied.hidden.requires_grad_()
    taken = {n: t.requires_grad_() for n, t in copied.shared().items() if t.is_floating_point()}
    with torch.enable_grad():
        out = first(streamed.compute(index, copied))
    put = {n: t for n, t in copied.shared().items() if t is not taken.get(n)}
    outs = [out, *(t for n, t in put.items() if n in shared)]
    torch.autograd.backward(outs, [gradient, *(shared.pop(n) for n in put if n in shared)])
    for name, tensor in taken.items():
        if tensor.grad is not None:
            shared[name] = shared[name] + tensor.grad if name in shared else tensor.grad
    found: Tensor | None = copied.hidden.grad
    assert found is not None, "outputs follow from inputs"
    return found


def _tail(
    streamed: StreamedModel,
    rows: Sequence[Mapping[str, Tensor]],
    last: Sequence[Tensor],
    head: Mapping[str, Any],
    found: dict[str, Array],
    tokens: int,
) -> list[Tensor]:
    """Gradients at the last block's outputs, of tokens drawn from the model; fills the head's."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    watch = _Watch(head)
    inputs = [x.requires_grad_() for x in last]
    with streamed.run(rows, gradients=True) as run:
        _skip_blocks(run, len(streamed.blocks), inputs)
        for output in run.results():
            logits = output.logits[0].float()
            with torch.enable_grad():
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                loss: Any = torch.nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
                loss.backward()
            del output, logits, loss
    streamed.release_rest()
    found |= watch.close(tokens)
    return [x.grad for x in inputs if x.grad is not None]


def _skip_blocks(run: Pass, count: int, last: Sequence[Tensor]) -> None:
    """Hand every row what its last block answered; blocks before that pass on what they get."""
    for index in range(count):
        run.answer(index, last if index == count - 1 else list(run.inputs(index)))


def _looked_up(
    streamed: StreamedModel,
    table: Task,
    rows: Sequence[Mapping[str, Tensor]],
    gradients: Sequence[Tensor],
    energy: float,
) -> dict[str, Array]:
    """Weights of an embedding as it is looked up: how often each token comes, each column's square.

    Tokens that the text lacks count as if they had come once. Some models scale what they look up;
    the energy of the first block's inputs tells by how much.
    """
    import torch

    with _embedding(streamed) as weight:
        ids = torch.cat([row["input_ids"].flatten() for row in rows])
        counts = torch.bincount(ids, minlength=weight.shape[0]).double() + 1
        own = float(weight.detach()[ids].double().square().sum())
    columns = sum(g.double().square().sum((0, 1)) for g in gradients)
    assert isinstance(columns, torch.Tensor)
    columns = columns / len(ids) * (energy / own if own > 0 else 1.0)
    each = counts / counts.sum()
    return {
        f"{LOOKED_UP}{ROWS}{table.module}": each.numpy().astype(np.float32),
        f"{LOOKED_UP}{COLUMNS}{table.module}": columns.numpy().astype(np.float32),
    }


@contextmanager
def _embedding(streamed: StreamedModel) -> Iterator[Any]:
    """The table that token numbers are looked up in."""
    module = streamed.model.get_input_embeddings()
    path = next(path for path, one in streamed.model.named_modules() if one is module)
    streamed.weights.load([f"{path}.weight"])
    try:
        yield module.weight
    finally:
        streamed.release_rest()


def sensitivities(
    folder: Path,
    tasks: Sequence[Task],
    *,
    reader: RowReader,
    shapes: Shapes,
    text: str,
    calibration: Calibration,
    source: Mapping[str, Any],
    say: Say,
    trust_remote_code: bool = False,
) -> Statistics:
    """``fisher`` of the release in ``folder`` on the text, from the cache where it is known.

    ``reader`` and ``shapes`` give its tensors. At most ``SEQUENCES`` of the calibration's sequences
    are used. One pass serves every target, method and spec. Raises CalibrationError.
    """
    key = {
        "source": dict(source),
        "calibration": calibration.to_json(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "matrices": sorted((task.module, describe(task.expr), task.table) for task in tasks),
        "sequences": SEQUENCES,
    }
    store = Store("fisher", key)

    def made() -> Statistics:
        fewer = replace(calibration, sequences=min(SEQUENCES, calibration.sequences))
        rows = model_rows(tokenized(text, folder, fewer))
        say(f"one backward pass over {len(rows)} x {calibration.length} tokens")
        streamed = StreamedModel(folder, reader, shapes, trust_remote_code=trust_remote_code)
        store.put(0, fisher(streamed, tasks, rows))
        return store.finish(1)

    return store.get(made, say)
