"""How much the model's output minds an error of each weight, from one backward pass.

Perturbing weights by d moves the next-token distribution by KL = d' F d / 2 to second order, with
F the Fisher information: the mean of g g' over texts whose next tokens are drawn from the model
itself, g the gradient of their log-likelihood. For a matrix F is taken as the product of the mean
squares of its inputs and of the gradients at its results, which is the diagonal of K-FAC (Martens
and Grosse, arXiv 1503.05671). Errors of rounding are nearly independent, so the diagonal is what
counts, and the sum estimates the mean KL of a whole recipe in nats.

Products are watched as they happen and followed to the stored matrices (``quant.calibrate.links``),
so stacked, fused and split matrices count like dense layers. Of a stack a sample of the matrices
stands for all. Blocks run one at a time, forwards and then backwards; their inputs wait in a
temporary folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.ops import RowReader, describe, sources
from quant.calibrate.aside import temporary
from quant.calibrate.calls import Call, first
from quant.calibrate.coding import by_block, links_of
from quant.calibrate.links import Links, Task
from quant.calibrate.loading import Shapes
from quant.calibrate.passes import Pass
from quant.calibrate.products import Key, watching
from quant.calibrate.store import Say, Statistics, Store
from quant.calibrate.stream import StreamedModel
from quant.calibrate.text import Calibration, model_rows, tokenized
from quant.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
SEQUENCES: Final = 16
"""Sequences at most: their tokens are enough for sums over whole rows and columns."""
SAMPLED: Final = 8
"""Matrices of a stack that are sampled, at most."""
ROWS: Final = "rows:"
COLUMNS: Final = "columns:"
MATRICES: Final = "matrices:"
LOOKED_UP: Final = "looked_up:"
_REVISION: Final = 2
"""Raised when the same release and text give other numbers: those on disk are then not taken."""
_SEED: Final = 0


def fisher(
    streamed: StreamedModel,
    tasks: Sequence[Task],
    rows: Sequence[Mapping[str, Tensor]],
    shapes: Shapes,
) -> dict[str, Array]:
    """Row and column weights of each task's matrix, by its module with a prefix.

    ``rows:`` (out,) and ``columns:`` (in,), so that half of the sum over rows and columns of
    rows * columns * d^2 estimates the KL of an error d. Of a stack they are (n, out) and (n, in)
    for the matrices that ``matrices:`` (n,) numbers, at most ``SAMPLED``, and their sum is that of
    the whole stack. An embedding has them as ``looked_up:rows:`` (tokens,) and
    ``looked_up:columns:`` (size,); a tied one has both pairs. What stands for no product of the
    reference, or moves its output by choices alone, is left out. Raises CalibrationError where
    everything is. ``shapes`` are those of the release's tensors.
    """
    mine = by_block(streamed, tasks)
    table, head = _of_module(streamed, tasks, _EMBEDDING), _of_module(streamed, tasks, _HEAD)
    count = len(streamed.blocks)
    tokens = sum(int(row["input_ids"].numel()) for row in rows)
    found: dict[str, Array] = {}
    settings: list[list[Call]] = []
    with temporary("fisher") as folder, streamed.run(rows) as run:
        states = _States(folder)
        for index in range(count):
            states.save(index, run.inputs(index))
            settings.append([run.call(index, row).settings() for row in range(run.count)])
            with streamed.loaded(index):
                run.forward(index, keep=True)
        last = [run.handed(row) for row in range(run.count)]
        streamed.release_rest()  # what was read in inference mode lets no gradient through
        gradients = _tail(streamed, rows, last, head, found, tokens)
        shared: list[dict[str, Tensor]] = [{} for _ in rows]
        for index in reversed(range(count)):
            seen = _Products(tokens)
            with (
                streamed.loaded(index),
                watching(streamed.held(index), seen.add, seen.back),
            ):
                for row in range(len(rows)):
                    call = settings[index][row].with_hidden(states.load(index, row))
                    gradients[row] = _back(streamed, index, call, gradients[row], shared[row])
            links = links_of(streamed, shapes, index, seen.axes)  # which needs no values
            inputs, results = seen.means(links)
            for task in mine.get(index, ()):
                found |= _weights(task, links, inputs, results)
    if table is not None:
        found |= _looked_up(streamed, table, rows, gradients)
    if not any(name.startswith(ROWS) for name in found):
        raise CalibrationError(
            f"none of the {len(tasks)} matrices stands for a product of "
            f"{type(streamed.model).__name__}, so their formats cannot be chosen by "
            "activations; leave --calibration-data out"
        )
    return found


_EMBEDDING: Final = "get_input_embeddings"
_HEAD: Final = "get_output_embeddings"


def _of_module(streamed: StreamedModel, tasks: Sequence[Task], getter: str) -> Task | None:
    """The task of the table that tokens are looked up in, or of what makes the logits.

    These may be the same.
    """
    module = getattr(streamed.model, getter)()
    path = next((path for path, one in streamed.model.named_modules() if one is module), None)
    name = streamed.weights.tied.get(f"{path}.weight", f"{path}.weight")
    group = streamed.weights.group_of.get(name)
    if module is None or group is None or group.converter is not None:
        return None
    whole = {group.names[0]}
    return next(
        (t for t in tasks if {s.name for s in sources(t.expr)} == whole and not t.stacked), None
    )


class _Products:
    """Sums of squares of what goes into a block's products, and of the gradients at their results.

    Gradients count as means over all tokens of the text, inputs as means over the tokens that came
    to the product: what an expert adds is the rarer, the fewer come.
    """

    def __init__(self, tokens: int) -> None:
        """``tokens`` are all of the text."""
        self._tokens = tokens
        self._seen: dict[Key, int] = {}
        self._inputs: dict[Key, Tensor] = {}
        self._results: dict[Key, Tensor] = {}
        self.axes: dict[Key, int] = {}

    def add(self, key: Key, axis: int, x: Tensor) -> None:
        """Count the inputs (..., cols) of a product."""
        self.axes[key] = axis
        self._seen[key] = self._seen.get(key, 0) + x[..., 0].numel()
        _sum(self._inputs, key, x.detach())

    def back(self, key: Key, gradient: Tensor) -> None:
        """Count the gradient at the results (..., rows) of a product."""
        _sum(self._results, key, gradient)

    def means(self, links: Links) -> tuple[dict[Key, Array], dict[Key, Array]]:
        """Mean squares of inputs and of gradients; zeros for experts that no token came to."""
        inputs = {key: value.numpy() / self._seen[key] for key, value in self._inputs.items()}
        results = {key: value.numpy() / self._tokens for key, value in self._results.items()}
        for name in {name for name, expert in results if expert is not None}:
            for means in (inputs, results):
                like = next(value for (other, _), value in means.items() if other == name)
                for key in links.members(name):
                    means.setdefault(key, np.zeros_like(like))
        return inputs, results


def _weights(
    task: Task, links: Links, inputs: Mapping[Key, Array], results: Mapping[Key, Array]
) -> dict[str, Array]:
    """What ``fisher`` gives for one task; nothing where it stands for no product."""
    if not task.stacked:
        one = links.factors(task, 0, inputs, results)
        return {} if one is None else _named(task.module, *one)
    pairs = [links.factors(task, index, inputs, results) for index in range(task.count)]
    held = [pair for pair in pairs if pair is not None]
    whole = np.array([rows.sum() * columns.sum() for rows, columns in held])
    if len(held) < task.count or not whole.sum() > 0:
        return {}
    numbers, times = sample(whole)
    rows = np.stack([held[i][0] * t for i, t in zip(numbers, times, strict=True)])
    columns = np.stack([held[i][1] for i in numbers])
    return {MATRICES + task.module: numbers, **_named(task.module, rows, columns)}


def sample(weights: Array) -> tuple[Array, Array]:
    """Numbers of at most ``SAMPLED`` members, and how many times each counts for the whole.

    Systematic sampling proportional to weight: the places are spread evenly over the sum of the
    ``weights``, so that what counts most is there, and members stand for equal shares of it.
    """
    if len(weights) <= SAMPLED:
        return np.arange(len(weights)), np.ones(len(weights))
    places = (np.arange(SAMPLED) + 0.5) / SAMPLED * weights.sum()
    found = np.searchsorted(np.cumsum(weights), places, side="right")
    numbers, counts = np.unique(np.minimum(found, len(weights) - 1), return_counts=True)
    return numbers, counts * weights.sum() / (SAMPLED * weights[numbers])


def _sum(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    import torch

    found = value.reshape(-1, value.shape[-1]).square().sum(0, dtype=torch.float64)
    sums[key] = sums[key] + found if key in sums else found


def _named(module: str, rows: Array, columns: Array) -> dict[str, Array]:
    return {ROWS + module: rows.astype(np.float32), COLUMNS + module: columns.astype(np.float32)}


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
    head: Task | None,
    found: dict[str, Array],
    tokens: int,
) -> list[Tensor]:
    """Gradients at the last block's outputs, of tokens drawn from the model; fills the head's."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    sums: dict[str, Tensor] = {}

    def watch(module: Any, given: tuple[Any, ...], out: Any) -> None:
        del module
        _sum(sums, COLUMNS, given[0].detach())
        out.register_hook(lambda gradient: _sum(sums, ROWS, gradient))

    hook = None if head is None else streamed.head.register_forward_hook(watch)
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
    if head is not None and hook is not None:
        hook.remove()
        means = {part: value.numpy() / tokens for part, value in sums.items()}
        found |= _named(head.module, means[ROWS], means[COLUMNS])
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
) -> dict[str, Array]:
    """Weights of an embedding as it is looked up: how often each token comes, each column's square.

    ``gradients`` are those at the first block's inputs, from which they go on to the embedding.
    Tokens that the text lacks count as if they had come once. Some models scale what they look up;
    the energy of what came out tells by how much. Nothing where no gradient arrives.
    """
    import torch

    came: list[Tensor] = []

    def keep(module: Any, given: tuple[Any, ...], out: Tensor) -> Tensor:
        del module, given
        came.append(out.detach().requires_grad_())
        return came[-1]

    hook = streamed.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with streamed.run(rows, gradients=True) as run:
            hook.remove()
            inputs = list(run.inputs(0))
            if len(came) != len(rows) or not all(x.requires_grad for x in inputs):
                return {}
            own = torch.autograd.grad(inputs, came, list(gradients), allow_unused=True)
    finally:
        hook.remove()
    if any(gradient is None for gradient in own):
        return {}
    with _embedding(streamed) as weight:
        ids = torch.cat([row["input_ids"].flatten() for row in rows])
        counts = torch.bincount(ids, minlength=weight.shape[0]).double() + 1
        stored = float(weight.detach()[ids].double().square().sum())
    energy = sum(float(x.detach().double().square().sum()) for x in came)
    sums: dict[str, Tensor] = {}
    for gradient in own:
        _sum(sums, COLUMNS, gradient)
    columns = sums[COLUMNS] / len(ids) * (energy / stored if stored > 0 else 1.0)
    return {
        f"{LOOKED_UP}{ROWS}{table.module}": (counts / counts.sum()).numpy().astype(np.float32),
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
        "sampled": SAMPLED,
        "revision": _REVISION,
    }
    store = Store("fisher", key)

    def made() -> Statistics:
        fewer = replace(calibration, sequences=min(SEQUENCES, calibration.sequences))
        rows = model_rows(tokenized(text, folder, fewer))
        say(f"one backward pass over {len(rows)} x {calibration.length} tokens")
        streamed = StreamedModel(folder, reader, shapes, trust_remote_code=trust_remote_code)
        store.put(0, fisher(streamed, tasks, rows, shapes))
        return store.finish(1)

    return store.get(made, say)
