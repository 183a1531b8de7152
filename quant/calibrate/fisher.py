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

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from quant.calibrate.assigned import Task, assigned
from quant.calibrate.blocks import Blocks, load_model
from quant.calibrate.files import Statistics, cache_file, load, save
from quant.calibrate.stream import usable
from quant.calibrate.text import Calibration, tokenized

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
SEQUENCES: Final = 16
"""Sequences at most: their tokens are enough for sums over whole rows and columns."""
ROWS: Final = "rows:"
COLUMNS: Final = "columns:"
LOOKED_UP: Final = "looked_up:"
_SEED: Final = 0


def fisher(blocks: Blocks, tasks: Sequence[Task]) -> dict[str, Array]:
    """Row and column weights of each task's matrix, by its source tensor with a prefix.

    ``rows:`` (out,) and ``columns:`` (in,), so that half of the sum over rows and columns of
    rows * columns * d^2 estimates the KL of an error d. An embedding has them as
    ``looked_up:rows:`` (tokens,) and ``looked_up:columns:`` (size,); a tied one has both pairs.
    """
    import torch

    owners, head = assigned(blocks, [task for task in tasks if not _only_table(task, blocks)])
    table = next((task for task in tasks if task.table), None)
    blocks.start()
    settings = [usable(given) for given in blocks._settings]
    found: dict[str, Array] = {}
    count = len(blocks.blocks)
    tokens = sum(row.shape[1] for row in blocks.ids)
    with tempfile.TemporaryDirectory() as folder:
        states = _States(Path(folder))
        hidden = [usable(state) for state in blocks.hidden]
        energy = sum(float(state.double().square().sum()) for state in hidden)
        for index in range(count):
            states.save(index, hidden)
            with _alone(blocks, index) as block, torch.no_grad():
                hidden = [
                    _first(block(x, *settings[index][0], **settings[index][1])) for x in hidden
                ]
        gradients = _tail(blocks, hidden, head, found, tokens)
        for index in reversed(range(count)):
            with _alone(blocks, index) as block:
                watch = _Watch(
                    {
                        owners[path].source: block.get_submodule(
                            path.removeprefix(f"{blocks.path}.{index}.")
                        )
                        for path in blocks.linears(index)
                        if path in owners
                    }
                )
                for row in range(len(gradients)):
                    x = states.load(index, row).requires_grad_()
                    with torch.enable_grad():
                        out = _first(block(x, *settings[index][0], **settings[index][1]))
                    out.backward(gradients[row])
                    assert x.grad is not None
                    gradients[row] = x.grad
                found.update(watch.close(tokens))
    if table is not None:
        found.update(_looked_up(blocks, table, gradients, energy))
    return found


class _States:
    """Inputs of every block on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, index: int, hidden: Sequence[Tensor]) -> None:
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


def _only_table(task: Task, blocks: Blocks) -> bool:
    """Whether an embedding is looked up and nothing else: the head has a matrix of its own."""
    if not task.table or blocks.head is None:
        return task.table
    tied: bool = blocks.head.weight is blocks.model.get_input_embeddings().weight
    return not tied


def _tail(
    blocks: Blocks,
    hidden: Sequence[Tensor],
    head: Task | None,
    found: dict[str, Array],
    tokens: int,
) -> list[Tensor]:
    """Gradients at the last block's outputs, of tokens drawn from the model; fills the head's."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    named = {} if head is None or blocks.head is None else {head.source: blocks.head}
    watch = _Watch(named)
    gradients = []
    for row, state in zip(blocks.ids, hidden, strict=True):
        x = state.clone().requires_grad_()
        with torch.enable_grad():
            logits = blocks.logits(row, x)[0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss: Any = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            loss.backward()
        assert x.grad is not None
        gradients.append(x.grad)
    found.update(watch.close(tokens))
    return gradients


def _looked_up(
    blocks: Blocks, table: Task, gradients: Sequence[Tensor], energy: float
) -> dict[str, Array]:
    """Weights of an embedding as it is looked up: how often each token comes, each column's square.

    Tokens that the text lacks count as if they had come once. Some models scale what they look up;
    the energy of the first block's inputs tells by how much.
    """
    import torch

    weight = blocks.model.get_input_embeddings().weight
    ids = torch.cat([row.flatten() for row in blocks.ids])
    counts = torch.bincount(ids, minlength=weight.shape[0]).double() + 1
    columns = sum(g.double().square().sum((0, 1)) for g in gradients)
    own = float(weight.detach()[ids].double().square().sum())
    assert isinstance(columns, torch.Tensor)
    columns = columns / len(ids) * (energy / own if own > 0 else 1.0)
    rows = counts / counts.sum()
    return {
        f"{LOOKED_UP}{ROWS}{table.source}": rows.numpy().astype(np.float32),
        f"{LOOKED_UP}{COLUMNS}{table.source}": columns.numpy().astype(np.float32),
    }


@contextmanager
def _alone(blocks: Blocks, index: int) -> Iterator[Any]:
    """A float32 copy of one block, whose weights take no gradients."""
    block = copy.deepcopy(blocks.blocks[index]).float().requires_grad_(False)
    yield block
    block.to("meta")


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def sensitivities(
    folder: Path,
    tasks: Sequence[Task],
    *,
    text: str,
    calibration: Calibration,
    source: Mapping[str, Any],
    say: Callable[[str], None],
    trust_remote_code: bool = False,
) -> Statistics:
    """``fisher`` of the release in ``folder`` on the text, from the cache where it is known.

    At most ``SEQUENCES`` of the calibration's sequences are used. One pass serves every target,
    method and spec. Raises CalibrationError.
    """
    key = {
        "source": dict(source),
        "calibration": calibration.to_json(),
        "tensors": sorted((task.source, task.table) for task in tasks),
        "sequences": SEQUENCES,
    }
    path = cache_file("fisher", key)
    if (found := load(path)) is not None:
        say(f"allocation: reusing {path}")
        return found
    fewer = replace(calibration, sequences=min(SEQUENCES, calibration.sequences))
    sequences = tokenized(text, folder, fewer)
    say(f"allocation: one backward pass over {len(sequences)} x {calibration.length} tokens")
    model = load_model(folder, trust_remote_code=trust_remote_code)
    return save(path, fisher(Blocks(model, sequences), tasks))
