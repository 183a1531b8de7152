"""The reference: transformers and torch on the CPU."""

import gc
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
_SUFFIX_TYPE: Final = {"paligemma": 1}
"""Token type of what follows the prompt, where it is not the prompt's own 0."""


class ReferenceError(ValueError):
    """The torch checkpoint cannot serve as a reference; the message says why."""


@dataclass(frozen=True)
class Greedy:
    """Greedy continuation of a prompt."""

    tokens: tuple[int, ...]
    logits: Logits
    """[tokens, vocabulary]: what each token was chosen from."""


class TorchReference:
    """A transformers model in evaluation mode, computing in one dtype."""

    def __init__(self, model: Any, *, folder: Path, dtype: str, trust_remote_code: bool) -> None:
        self.model = model
        self.folder = folder
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code

    @classmethod
    def load(
        cls, folder: Path, *, dtype: str = "float32", trust_remote_code: bool = False
    ) -> "TorchReference":
        """Load ``folder`` to compute in ``dtype``; ReferenceError when a parameter is missing."""
        import torch

        logs: Any = import_module("transformers.utils.logging")
        logs.disable_progress_bar()
        auto = model_class(folder)
        try:
            model, info = auto.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ReferenceError(f"{folder}: transformers cannot load it: {error}") from error
        lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if lost:
            raise ReferenceError(
                f"{folder}: {len(lost)} parameters of {type(model).__name__} have no weights in "
                f"the checkpoint, so it would compute with random ones: {', '.join(lost[:5])}"
            )
        model.eval()
        return cls(model, folder=folder, dtype=dtype, trust_remote_code=trust_remote_code)

    def close(self) -> None:
        """Drop the weights."""
        self.model = None
        gc.collect()

    def holds_in(self, dtype: str) -> bool:
        """Whether every parameter is exactly representable in ``dtype``."""
        import torch

        narrow = getattr(torch, dtype)
        return all(
            bool((value.to(narrow).to(value.dtype) == value).all())
            for value in self.model.parameters()
        )

    def round_to(self, dtype: str) -> None:
        """Round every parameter to ``dtype``, keeping the dtype it computes in."""
        import torch

        narrow = getattr(torch, dtype)
        with torch.no_grad():
            for value in self.model.parameters():
                value.copy_(value.to(narrow))

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def describe(self) -> dict[str, str]:
        """Class, folder, dtype and versions, for the report."""
        import torch
        import transformers

        return {
            "class": type(self.model).__name__,
            "folder": self.folder.name,
            "dtype": self.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits of every position of one prompt, [positions, vocabulary]."""
        return self.forward(self._text_inputs(ids))

    def forward(self, inputs: Mapping[str, Any]) -> Logits:
        """Logits of every position for prepared inputs of batch one."""
        import torch

        with torch.inference_mode():
            output = self.model(**self._cast(inputs), use_cache=False)
        return _numpy(output.logits[0])

    def greedy(self, ids: Sequence[int], count: int) -> Greedy:
        """``count`` greedy tokens after a text prompt, one cached step at a time."""
        return self.greedy_from(self._text_inputs(ids), count)

    def _has_usual_cache(self) -> bool:
        """Whether steps hand on ``past_key_values``; pure state-space models do otherwise."""
        return "past_key_values" in inspect.signature(self.model.forward).parameters

    def greedy_from(self, inputs: Mapping[str, Any], count: int) -> Greedy:
        """``count`` greedy tokens after prepared inputs.

        Text uses the cache, as generation does. With images each step recomputes the whole
        sequence, because what a cached step needs besides the token differs by architecture.
        """
        import torch

        tokens: list[int] = []
        rows: list[Logits] = []
        current = dict(self._cast(inputs))
        cached = set(inputs) <= {"input_ids", "attention_mask"} and self._has_usual_cache()
        cache = None
        with torch.inference_mode():
            for _ in range(count):
                if cached:
                    step = current if cache is None else {"input_ids": _row(tokens[-1:])}
                    output = self.model(**step, past_key_values=cache, use_cache=True)
                    cache = output.past_key_values
                else:
                    output = self.model(**current, use_cache=False)
                rows.append(_numpy(output.logits[0, -1]))
                tokens.append(int(rows[-1].argmax()))
                if not cached:
                    kind = _SUFFIX_TYPE.get(self.model.config.model_type, 0)
                    current = _extended(current, tokens[-1], token_type=kind)
        return Greedy(tokens=tuple(tokens), logits=np.stack(rows))

    def hidden(self, ids: Sequence[int]) -> Logits:
        """Last hidden state of an encoder, [positions, hidden size]."""
        import torch

        with torch.inference_mode():
            output = self.model.base_model(**self._text_inputs(ids))  # the encoder below any head
        return _numpy(output.last_hidden_state[0])

    def _text_inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        import torch

        row = _row(ids)
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}

    def _cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        dtype = getattr(torch, self.dtype)
        return {
            key: value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for key, value in inputs.items()
        }


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder; ReferenceError when it is missing or not an object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReferenceError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ReferenceError(f"{path}: expected an object")
    return config


def model_class(folder: Path) -> Any:
    """The transformers class that ``config.json`` names, or the Auto class that fits."""
    import transformers

    config = read_config(folder)
    name = (config.get("architectures") or [""])[0]
    if name and hasattr(transformers, name):
        return getattr(transformers, name)
    if "vision_config" in config:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _row(ids: Sequence[int]) -> Any:
    import torch

    return torch.tensor([list(ids)], dtype=torch.long)


def _extended(inputs: Mapping[str, Any], token: int, *, token_type: int) -> dict[str, Any]:
    """The inputs with one more text token: every [1, length] tensor grows by its text value."""
    import torch

    length = inputs["input_ids"].shape[1]
    fill = {"input_ids": token, "attention_mask": 1, "token_type_ids": token_type}
    result = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == (1, length):
            extra = torch.full((1, 1), fill.get(key, 0), dtype=value.dtype)
            result[key] = torch.cat([value, extra], dim=1)
    return result


def _numpy(tensor: Any) -> Logits:
    array: Logits = tensor.detach().float().cpu().numpy()
    return array
