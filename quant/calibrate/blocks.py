"""A transformers model as a chain of decoder blocks that run one at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.calibrate.text import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor, nn


class _StopForward(Exception):
    """Not an error: the forward pass has shown enough."""


class Blocks:
    """The text part of a model: its embedding, its list of blocks, and what follows them.

    Blocks compute in float32, one at a time; between them only ``hidden`` states live: one
    (1, length, size) tensor for each sequence.
    """

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]]) -> None:
        """Run the embedding; raises CalibrationError where no list of blocks is found."""
        import torch

        self.model = model
        model.get_input_embeddings().float()  # the hidden states and masks take its type
        self.root = _decoder(model)
        self.path, self.blocks = _block_list(model, self.root)
        self.head = model.get_output_embeddings()
        """The output projection, or None."""
        names = {id(module): path for path, module in model.named_modules()}
        self.head_name = names.get(id(self.head), "no head").rpartition(".")[2]
        self.ids = [torch.tensor([list(row)], dtype=torch.long) for row in sequences]
        self._settings: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []

    def start(self) -> None:
        """Make the first block's inputs from the embedding as it is now."""
        self._settings = self._record_settings()
        self.hidden = [self._embedded(row) for row in self.ids]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The dense layers of block ``index`` by their full path in the model."""
        from torch import nn

        prefix = f"{self.path}.{index}"
        return {
            f"{prefix}.{name}": module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def run(self, index: int, *, keep: bool) -> None:
        """Put every sequence through block ``index``; ``keep`` the outputs as the next inputs."""
        import torch

        block = self.blocks[index].float()
        positional, named = self._settings[index]
        with torch.inference_mode():
            for row, state in enumerate(self.hidden):
                out = block(state, *positional, **named)
                if keep:
                    self.hidden[row] = out[0] if isinstance(out, tuple) else out

    def release(self, index: int) -> None:
        """Give the memory of block ``index`` back; it cannot run again."""
        self.blocks[index].to("meta")
        gc.collect()

    def head_inputs(self) -> Iterator[Tensor]:
        """What the output projection sees for each sequence, after the last block has run."""
        assert self.head is not None
        seen: list[Any] = []

        def stop(module: Any, given: tuple[Any, ...]) -> None:
            seen.append(given[0])
            raise _StopForward

        hook = self.head.register_forward_pre_hook(stop)
        try:
            for row, state in zip(self.ids, self.hidden, strict=True):
                outputs: list[Callable[..., Any]] = [
                    lambda hidden, *a, state=state, **k: state for _ in self.blocks
                ]
                self._forward(row, outputs)
                yield seen.pop()
        finally:
            hook.remove()

    def logits(self, row: Tensor, state: Tensor) -> Tensor:
        """What the model makes of the last block's output ``state``; gradients pass."""
        self.model.requires_grad_(False)
        waiting = {id(p) for p in self.blocks.parameters()}
        for part in (self.root, self.head):  # the norm behind the blocks, and the head
            for p in [] if part is None else part.parameters():
                p.data = p.data if id(p) in waiting else p.data.float()
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced(block, lambda hidden, *a, **k: state))
            found: Tensor = self.model(input_ids=row, use_cache=False).logits
            return found.float()

    def _record_settings(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each block is given besides the hidden states; it depends on the length alone."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Any, *positional: Any, **named: Any) -> Any:
            found.append((positional, named))
            if len(found) == len(self.blocks):
                raise _StopForward
            return hidden

        self._forward(self.ids[0], [record] * len(self.blocks))
        assert len(found) == len(self.blocks), "a block did not run"
        return found

    def _embedded(self, row: Tensor) -> Tensor:
        found: list[Tensor] = []

        def record(hidden: Any, *positional: Any, **named: Any) -> Any:
            found.append(hidden.float())
            raise _StopForward

        self._forward(row, [record] * len(self.blocks))
        return found[0]

    def _forward(self, row: Tensor, stand_ins: Sequence[Callable[..., Any]]) -> None:
        """Run the model with every block's computation replaced."""
        import torch

        with ExitStack() as stack, torch.inference_mode():
            for block, stand_in in zip(self.blocks, stand_ins, strict=True):
                stack.enter_context(_replaced(block, stand_in))
            try:
                self.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
            except _StopForward:
                return


@contextmanager
def _replaced(block: Any, forward: Callable[..., Any]) -> Iterator[None]:
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def load_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The release in ``folder`` as transformers runs it, its weights in their stored type."""
    import transformers

    logs: Any = import_module("transformers.utils.logging")
    logs.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    name = (getattr(config, "architectures", None) or [""])[0]
    auto = getattr(transformers, name, None) or (
        transformers.AutoModelForImageTextToText
        if hasattr(config, "vision_config")
        else transformers.AutoModelForCausalLM
    )
    try:
        model = auto.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CalibrationError(f"{folder}: transformers cannot load it: {error}") from error
    return model.eval()


def _decoder(model: Any) -> Any:
    get = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    return model if found is None else found


def _block_list(model: Any, root: Any) -> tuple[str, Any]:
    """The list with the most parameters below ``root``, with its path in the model."""
    from torch import nn

    inside = {id(module) for module in root.modules()}
    lists = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside
    ]
    if not lists:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks to calibrate one at a time; "
            "use --q-method search"
        )
    _, path, module = max(lists, key=lambda found: found[0])
    return path, module
