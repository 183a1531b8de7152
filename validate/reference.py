"""The reference: transformers and torch on the CPU."""

import gc
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from validate.stand_ins import stand_in
from validate.torch_faults import complete, mend, needless

Logits = NDArray[np.float32]
_SUFFIX_TYPE: Final = {"paligemma": 1}
"""Token type of what follows the prompt, where it is not the prompt's own 0."""
_MEDIA_TOKENS: Final = tuple(
    f"{medium}_token_{kind}"
    for medium in ("image", "video", "audio", "eoi", "eoa")
    for kind in ("id", "index")
)
_AUTO_CLASSES: Final = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


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
        auto, config = model_class(folder), read_config(folder)
        other = stand_in(config)
        mend(str(config.get("model_type")))
        if other:
            auto._keys_to_ignore_on_load_unexpected = list(other.beside)
        try:
            model, info = auto.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                key_mapping=dict(other.names) if other else None,
                **borrowed_settings(auto, config),
            )
            if other:
                other.complete(model, folder)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ReferenceError(f"{folder}: transformers cannot load it: {error}") from error
        lost = sorted(key for key in info["missing_keys"] if not needless(key))
        lost += sorted(str(key) for key in info["mismatched_keys"])
        if lost:
            raise ReferenceError(
                f"{folder}: {len(lost)} parameters of {type(model).__name__} have no weights in "
                f"the checkpoint, so it would compute with random ones: {', '.join(lost[:5])}"
            )
        model.eval()
        complete(model)
        model = getattr(model, "thinker", model)  # what reads and answers, beside what speaks
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

    @property
    def positions(self) -> int | None:
        """Tokens that the table of positions has room for; None where none is stated."""
        stated = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if stated is None else int(stated)

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
        return self.forward(self.text_inputs(ids))

    def forward(self, inputs: Mapping[str, Any]) -> Logits:
        """Logits of every position for prepared inputs of batch one.

        Of a decoder that answers an encoder, of its first position alone: the prompt is read.
        """
        import torch

        with torch.inference_mode():
            output = self.model(**self.cast(inputs), **self.answer_so_far(()), use_cache=False)
        return _numpy(output.logits[0])

    def answer_so_far(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What a decoder beside an encoder is given: its start and the ``tokens`` of its answer."""
        if not self.model.config.is_encoder_decoder:
            return {}
        start = self.model.config.get_text_config(decoder=True).decoder_start_token_id
        return {"decoder_input_ids": _row([start, *tokens])}

    def greedy(self, ids: Sequence[int], count: int) -> Greedy:
        """``count`` greedy tokens after a text prompt, one cached step at a time."""
        return self.greedy_from(self.text_inputs(ids), count)

    def steps_with_cache(self, inputs: Mapping[str, Any]) -> bool:
        """Whether steps hand on a cache; what comes with a picture is computed anew each time."""
        return self.cache_name is not None and set(inputs) <= {"input_ids", "attention_mask"}

    @cached_property
    def cache_name(self) -> str | None:
        """How this class calls its cache, as an argument and in what it answers.

        transformers 5.24 renamed ``past_key_values``; code that comes with a release has the old
        name. None of a state-space model of before, which takes a state of another kind.
        """
        known = inspect.signature(self.model.forward).parameters
        return next((name for name in ("cache", "past_key_values") if name in known), None)

    def kept_by(self, output: Any) -> dict[str, Any]:
        """The cache that ``output`` brought, as an argument of the next step; {} without one."""
        cache = None if self.cache_name is None else getattr(output, self.cache_name, None)
        return {} if cache is None else {str(self.cache_name): cache}

    def ends(self, token: int) -> bool:
        """Whether a continuation ends with ``token``, one that stands for a picture or a sound."""
        return token in {getattr(self.model.config, name, None) for name in _MEDIA_TOKENS}

    def extended(self, inputs: Mapping[str, Any], token: int) -> dict[str, Any]:
        """The inputs with one more text token."""
        kind = _SUFFIX_TYPE.get(self.model.config.model_type, 0)
        return _extended(inputs, token, token_type=kind)

    def greedy_from(self, inputs: Mapping[str, Any], count: int) -> Greedy:
        """``count`` greedy tokens after prepared inputs.

        Text uses the cache, as generation does. With images, and where an encoder read the prompt,
        each step recomputes the whole sequence, because what a cached step needs besides the token
        differs by architecture. A token that stands for a picture ends them: what libraries embed
        for one of its own differs.
        """
        import torch

        tokens: list[int] = []
        rows: list[Logits] = []
        current = dict(self.cast(inputs))
        apart = bool(self.answer_so_far(()))
        cached = self.steps_with_cache(inputs) and not apart
        kept: dict[str, Any] = {}
        with torch.inference_mode():
            for _ in range(count):
                if cached:
                    step = {"input_ids": _row(tokens[-1:])} if kept else current
                    output = self.model(**step, **kept, use_cache=True)
                    kept = self.kept_by(output)
                    cached = bool(kept)  # some classes leave making one to generation
                else:
                    answered = self.answer_so_far(tokens)
                    output = self.model(**current, **answered, use_cache=False)
                rows.append(_numpy(output.logits[0, -1]))
                tokens.append(int(rows[-1].argmax()))
                if self.ends(tokens[-1]):
                    break
                if not cached and not apart:
                    current = self.extended(current, tokens[-1])
        return Greedy(tokens=tuple(tokens), logits=np.stack(rows))

    def hidden(self, ids: Sequence[int]) -> Logits:
        """Last hidden state of an encoder [positions, hidden size], or its embedding [1, size]."""
        import torch
        from torch.nn.functional import normalize

        inputs = self.text_inputs(ids)
        with torch.inference_mode():
            if self.is_pair:
                return _numpy(normalize(self.model.get_text_features(**inputs).pooler_output))
            output = self.model.base_model(**inputs)  # the encoder below any head
        return _numpy(output.last_hidden_state[0])

    @property
    def is_pair(self) -> bool:
        """Whether texts and pictures have a tower each, as in CLIP."""
        return hasattr(self.model, "get_text_features")

    def states(self, inputs: Mapping[str, Any]) -> Logits:
        """Last hidden state of prepared inputs, [positions, hidden size]."""
        import torch

        with torch.inference_mode():
            output = self.model(**self.cast(inputs))
        return _numpy(output.last_hidden_state[0])

    def picture(self, pixels: Any) -> Logits:
        """A tower's last hidden state of a picture [1, channels, rows, columns]."""
        import torch

        with torch.inference_mode():
            output = self.model(**self.cast({"pixel_values": pixels}))
        return _numpy(output.last_hidden_state[0])

    def text_inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        """Model inputs of one text."""
        import torch

        row = _row(ids)
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}

    def cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with their floats in the model's dtype."""
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


def lacks_class(folder: Path, *, trust_remote_code: bool) -> str:
    """Why no torch class computes this release, and what to do about it; "" when there is one."""
    import transformers

    config = read_config(folder)
    name, model_type = _architecture(config), str(config.get("model_type"))
    version = f"transformers {transformers.__version__}"
    if "dflash_config" in config:
        return (
            f"{version} has no {name}, and a drafter computes nothing without its model: validate "
            "it beside the converted model with --draft-for MODEL"
        )
    known = transformers.CONFIG_MAPPING
    if hasattr(transformers, name):
        return ""
    # A type may be known as a part of another alone, without a head of its own.
    if model_type in known and known[model_type] in model_class(folder)._model_mapping:
        return ""
    if not _own_classes(config):
        return (
            f"{version} has no {name or model_type}, and the release brings no model code either: "
            "install a version of transformers that has the class, then validate again"
        )
    if trust_remote_code:
        return ""
    return (
        f"{version} has no {name or model_type}; the release brings its own model code, which runs "
        "only with --trust-remote-code: read that code, then validate again with the flag"
    )


def model_class(folder: Path) -> Any:
    """The transformers class that ``config.json`` names, or the Auto class that fits."""
    import transformers

    config = read_config(folder)
    name = _architecture(config)
    if name and hasattr(transformers, name):
        return getattr(transformers, name)
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        for own in _own_classes(config):
            return getattr(transformers, own)
    if "vision_config" in config:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def borrowed_settings(auto: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``from_pretrained`` must be told of a release that runs another type's class.

    Kimi K2 is DeepSeek V3 under a name of its own; the class renames weights by its own type only.
    """
    import transformers

    own = getattr(auto, "config_class", None)
    other = stand_in(config)
    if own is not None and other is not None:
        return {"config": own.from_dict(other.config(config))}
    if own is None or config.get("model_type") in transformers.CONFIG_MAPPING:
        return {}
    return {"config": own.from_dict({**config, "model_type": own.model_type})}


def _architecture(config: Mapping[str, Any]) -> str:
    other = stand_in(config)
    if other is not None:
        return other.architecture
    names = config.get("architectures") or [""]
    return str(names[0])


def _own_classes(config: Mapping[str, Any]) -> list[str]:
    """The Auto classes through which a release's own code is loaded, those with a head first."""
    own = config.get("auto_map")
    return [name for name in _AUTO_CLASSES if isinstance(own, Mapping) and name in own]


def _row(ids: Sequence[int]) -> Any:
    import torch

    return torch.tensor([list(ids)], dtype=torch.long)


def _extended(inputs: Mapping[str, Any], token: int, *, token_type: int) -> dict[str, Any]:
    """The inputs with one more text token: every [1, length] tensor grows by its text value.

    A sound's mask may have that length too; its name tells it apart.
    """
    import torch

    length = inputs["input_ids"].shape[1]
    fill = {"input_ids": token, "attention_mask": 1, "token_type_ids": token_type}
    result = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == (1, length) and "feature" not in key:
            extra = torch.full((1, 1), fill.get(key, 0), dtype=value.dtype)
            result[key] = torch.cat([value, extra], dim=1)
        elif key == "cross_attention_mask":  # a new token sees what the last one sees
            result[key] = torch.cat([value, value[:, -1:]], dim=1)
    return result


def _numpy(tensor: Any) -> Logits:
    array: Logits = tensor.detach().float().cpu().numpy()
    return array
