"""The stock MLX runtimes on one checkpoint: mlx-vlm, and mlx-lm where it has the model."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from validate.cases import Case
from validate.fault import Deviation
from validate.model_file import ModelFileError, runtimes_of, trusted

Logits = NDArray[np.float32]
_READING: Final = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
RUNTIMES: Final = ("mlx_vlm", "mlx_lm")
_NEEDS_METAL: Final = ("metal", "::eval] currently only supports float32")
"""What a runtime's error says, in lower case, where MLX's CPU backend has no such kernel."""
_prepared = False


class RuntimeRefusal(ValueError):
    """A stock runtime cannot load or run the checkpoint here; the message says why."""

    def __init__(self, message: str, *, needs_metal: bool = False) -> None:
        super().__init__(message)
        self.needs_metal = needs_metal


def prepare_mlx() -> bool:
    """Put a fast BLAS into the process before MLX is first imported; call it before any import.

    The Linux wheel of MLX resolves BLAS in the global symbol scope and links the slow reference
    implementation; torch's CPU library, loaded globally first, takes its place (20 x faster
    float32 matrix products). Does nothing on macOS. Returns False when MLX was imported before
    without it, so that computing is right but slow.
    """
    global _prepared
    if _prepared or not sys.platform.startswith("linux"):
        return True
    if "mlx.core" in sys.modules:
        return False
    spec = importlib.util.find_spec("torch")
    for place in spec.submodule_search_locations or () if spec else ():
        library = Path(place) / "lib" / "libtorch_cpu.so"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            _prepared = True
    return _prepared


def runtimes_for(config: Mapping[str, Any], folder: Path | None = None) -> tuple[str, ...]:
    """The runtimes that have a model for this config's ``model_type``, mlx_vlm first.

    Where the checkpoint in ``folder`` brings its own model code, those that can load that code.
    """
    if folder is not None and config.get("model_file"):
        with contextlib.suppress(ModelFileError):
            return runtimes_of(folder / str(config["model_file"]))
        return ()
    return tuple(name for name in RUNTIMES if _knows(name, dict(config)))


_UNUSABLE: Final = {
    ("mlx_lm", "kimi_vl"): "its loader leaves kv_b_proj whole, where its model has it in two",
    ("mlx_vlm", "llama4_text"): "its model gives bare arrays, which its generation does not take",
}
"""Modules of the stock runtimes that no checkpoint of their type runs in, and why."""


def _knows(name: str, config: dict[str, Any]) -> bool:
    if (name, config.get("model_type")) in _UNUSABLE:
        return False
    if name == "mlx_lm" and (not is_generative(config) or "dflash_config" in config):
        return False
    with _quiet(), contextlib.suppress(ValueError, KeyError, ImportError, SystemExit):
        if name == "mlx_vlm":
            from mlx_vlm.embedding_loader import EMBEDDING_MODEL_REMAPPING
            from mlx_vlm.utils import get_model_and_args

            if not is_generative(config):
                named = str(config.get("model_type"))
                config["model_type"] = EMBEDDING_MODEL_REMAPPING.get(named, named)
            # Some packages hold only the text stack of a multimodal type.
            return hasattr(get_model_and_args(config)[0], "ModelConfig")
        else:
            from mlx_lm.utils import _get_classes

            _get_classes(config)
        return True
    return False


_WRITING: Final = (
    *("For", "Draft", "LMHeadModel", "ChatModel", "Moondream", "MiniCPMO"),
    "Omni_Reasoning",
)
"""Words in the names of classes that write text; a few releases' own have no ``For...``."""


def is_generative(config: Mapping[str, Any]) -> bool:
    """Whether the architecture writes text (``...ForCausalLM``); encoders only read it."""
    names = config.get("architectures") or ()
    name = str(names[0]) if names else ""
    headed = any(word in name for word in _WRITING)
    return not name or (headed and not any(word in name for word in _READING))


@dataclass(frozen=True)
class Steps:
    """A prompt run with a cache: its own logits, then those of each following single token."""

    prefill: Logits
    """[positions, vocabulary]"""
    steps: Logits
    """[tokens, vocabulary]: row k was computed after k tokens of the continuation."""


Asked = tuple[Mapping[str, Any], Sequence[int]]
"""A prompt as ``run`` takes it: inputs and continuation."""


class MlxRuntime:
    """A checkpoint loaded by one stock runtime, exactly as that runtime loads it."""

    def __init__(self, name: str, model: Any, config: Mapping[str, Any], folder: Path) -> None:
        self.name = name
        self.model = model
        self.config = config
        self.folder = folder

    @classmethod
    def load(
        cls, folder: Path, *, runtime: str, trust_remote_code: bool = False, lazy: bool = False
    ) -> "MlxRuntime":
        """Load through ``mlx_vlm`` or ``mlx_lm``; RuntimeRefusal with the runtime's own words.

        ``lazy`` leaves the weights unread until they are used.
        """
        from validate.reference import read_config

        config = read_config(folder)
        own = config.get("model_file")
        trust_remote_code = trust_remote_code or bool(own and trusted(folder / str(own)))
        if own and not trust_remote_code:
            raise RuntimeRefusal(
                f"{folder}: config.json names model code of its own ({config['model_file']}); "
                "it runs only with --trust-remote-code"
            )
        with refusals(runtime, folder), _quiet():
            if runtime == "mlx_lm":
                from mlx_lm.utils import load_model

                model, _ = load_model(folder, lazy, trust_remote_code=trust_remote_code)
            elif is_generative(config):
                from mlx_vlm.utils import load_model as load_vlm

                model = load_vlm(folder, lazy)
            else:
                from mlx_vlm.embedding_loader import load_embedding_model

                model = load_embedding_model(folder)
        return cls(runtime, model, config, folder)

    def describe(self) -> dict[str, str]:
        """Name and versions, for the report."""
        import mlx.core as mx

        return {
            "name": self.name,
            "version": importlib.metadata.version(self.name.replace("_", "-")),
            "mlx": importlib.metadata.version("mlx"),
            "device": str(mx.default_device()),
            "model": f"{type(self.model).__module__}.{type(self.model).__name__}",
        }

    def parameters(self) -> dict[str, Any]:
        """Every parameter by the runtime's own path."""
        from mlx.utils import tree_flatten

        return dict(tree_flatten(self.model.parameters()))

    def quantized(self) -> bool:
        """Whether any module computes with packed codes."""
        return any(_is_quantized(module) for _, module in self.model.named_modules())

    def to_float32(self, *, dense: bool, evaluate: bool = True) -> None:
        """Compute in float32 from the loaded weights, cast in memory, when used or at once.

        ``dense`` also unpacks the codes into float32 matrices, which compute what the packed
        kernel computes up to the order of accumulation, and on a CPU a hundred times faster.
        """
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        self.model.set_dtype(mx.float32)
        if dense:
            modules = [
                (name, _unpacked(module, evaluate=evaluate))
                for name, module in self.model.named_modules()
                if _is_quantized(module)
            ]
            if modules:
                self.model.update_modules(tree_unflatten(modules))
        for module in self.model.modules():
            _look_up_in_float32(module)
        if evaluate:
            mx.eval(self.model.parameters())

    def without(
        self, known: Sequence[Deviation], *, source: Path
    ) -> contextlib.AbstractContextManager[None]:
        """Take documented faults out of the model meanwhile."""
        from validate.deviations import without

        return without(known, self.model, self.config, source=source)

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits of every position of one prompt, [positions, vocabulary]."""
        return self.run(self.text_inputs(ids)).prefill

    def sample(self, ids: Sequence[int]) -> Logits:
        """What the model makes of a few tokens: logits, or an encoder's hidden states."""
        return self.logits(ids) if is_generative(self.config) else self.hidden(ids)[0]

    def continued(self, ids: Sequence[int], continuation: Sequence[int]) -> Steps:
        """Run the prompt, then feed ``continuation`` one token at a time through the cache."""
        return self.run(self.text_inputs(ids), continuation)

    def run(self, inputs: Mapping[str, Any], continuation: Sequence[int] = ()) -> Steps:
        """As stock generation runs it: embed, prefill with a cache, then single-token steps.

        Row 0 of ``steps`` is the prompt's last row; the last token of ``continuation`` is not
        fed, because nothing follows it.
        """
        with refusals(self.name, self.folder):
            output, step = self.prefill(inputs)
            prefill = numpy_of(output[0])
            following = [numpy_of(step(self._row([t]))[0, -1]) for t in continuation[:-1]]
            return self.steps_of(prefill, following)

    def runs(self, asked: Sequence[Asked]) -> list[Steps]:
        """What ``run`` gives for each prompt."""
        return [self.run(inputs, continuation) for inputs, continuation in asked]

    def text_inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        """Model inputs of one text."""
        return {"input_ids": self._row(ids)}

    def steps_of(self, prefill: Logits, following: Sequence[Logits]) -> Steps:
        """Logits [positions, all] of a prompt and [all] of each token after it, of words alone."""
        words = slice(word_count(self.config))
        first = prefill[:, words]
        return Steps(first, np.stack([first[-1], *(row[words] for row in following)]))

    def prefill(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Logits of prepared inputs, and what feeds one token more through their cache."""
        if self.name == "mlx_lm":
            from mlx_lm.models.cache import make_prompt_cache

            cache = make_prompt_cache(self.model)
            return self.model(inputs["input_ids"], cache=cache), (
                lambda token: self.model(token, cache=cache)
            )
        from mlx_vlm.models.cache import make_prompt_cache as make_vlm_cache

        extra = {
            key: value
            for key, value in inputs.items()
            if key not in ("input_ids", "pixel_values", "attention_mask")
        }
        embedded = self.model.get_input_embeddings(
            inputs["input_ids"],
            inputs.get("pixel_values"),
            mask=inputs.get("attention_mask"),
            **extra,
        )
        extra.update(
            (k, v) for k, v in embedded.to_dict().items() if k != "inputs_embeds" and v is not None
        )
        language = self.model.language_model
        caches = make_vlm_cache(language)
        output = language(
            inputs["input_ids"], inputs_embeds=embedded.inputs_embeds, cache=caches, **extra
        )
        carried = {
            name: value
            for name in ("cross_attention_states", "encoder_outputs")
            if (value := getattr(output, name, None)) is not None
        }
        return output.logits, lambda token: language(token, cache=caches, **carried).logits

    def hidden(self, ids: Sequence[int]) -> tuple[Logits, Logits]:
        """An encoder's last hidden state [positions, size] and its sentence embedding [size].

        Where the runtime gives no states, the embedding stands for them as [1, size].
        """
        with refusals(self.name, self.folder):
            output = self.model(self._row(ids))
            states, pooled = output.last_hidden_state, numpy_of(output.text_embeds[0])
            return pooled[None] if states is None else numpy_of(states[0]), pooled

    def states(self, inputs: Mapping[str, Any]) -> Logits:
        """An encoder's last hidden state of prepared inputs, [positions, size]."""
        with refusals(self.name, self.folder):
            return numpy_of(self.model(**inputs).last_hidden_state[0])

    def picture(self, pixels: Any) -> Logits:
        """A tower's last hidden state of a picture [1, channels, rows, columns]."""
        import mlx.core as mx

        with refusals(self.name, self.folder):
            output = self.model(mx.array(np.moveaxis(np.asarray(pixels), 1, -1)))
            return numpy_of(output["last_hidden_state"][0])

    def media_inputs(self, case: Case, *, stock_prompt: bool = False) -> dict[str, Any]:
        """Model inputs for a picture or a sound and a question, through this runtime's processor.

        The prompt is written by the release's own chat template, or with ``stock_prompt`` by the
        helper that the runtime's command line uses, which has formats of its own.
        """
        from validate.runtime_inputs import media_inputs

        with refusals(self.name, self.folder), _quiet():
            inputs = media_inputs(self.folder, self.model.config, case, stock_prompt=stock_prompt)
        inputs["input_ids"] = self._ids(inputs["input_ids"])
        return inputs

    def takes_videos(self) -> bool:
        """Whether this runtime's processor prepares videos as such."""
        from validate.runtime_inputs import takes_videos

        with refusals(self.name, self.folder), _quiet():
            return self.name == "mlx_vlm" and takes_videos(self._processor)

    def tokenize(self, case: Case) -> list[int]:
        """Token ids of a text or a conversation, as this runtime's own loader makes them."""
        with refusals(self.name, self.folder), _quiet():
            processor = self._processor
            tokenizer = getattr(processor, "tokenizer", processor)
            if self.name == "mlx_lm":
                tokenizer = processor
            if not case.messages:
                return list(tokenizer.encode(case.text))
            if self.name == "mlx_lm":
                text = tokenizer.apply_chat_template(
                    case.conversation(), add_generation_prompt=True, tokenize=False
                )
            else:
                from mlx_vlm.prompt_utils import apply_chat_template

                text = apply_chat_template(processor, dict(self.config), case.conversation())
            return list(tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _processor(self) -> Any:
        """What makes tokens of texts, loaded once: that takes longer than a twin's forward."""
        if self.name == "mlx_lm":
            utils: Any = import_module("mlx_lm.utils")
            return utils.load_tokenizer(self.folder)
        from validate.runtime_inputs import load_processor

        return load_processor(self.folder)

    def _row(self, ids: Sequence[int]) -> Any:
        import mlx.core as mx

        return mx.array([list(ids)], dtype=mx.int32)

    def _ids(self, ids: Any) -> Any:
        import mlx.core as mx

        return ids if isinstance(ids, mx.array) else mx.array(ids)


def _is_quantized(module: Any) -> bool:
    return hasattr(module, "bits") and "scales" in module and "weight" in module


def _look_up_in_float32(module: Any) -> None:
    """Let a microscaled embedding give float32: MLX unpacks those to bfloat16 unless told so.

    Every value of the formats is exact in bfloat16, but what follows would be computed in it.
    """
    import mlx.core as mx

    nn: Any = import_module("mlx.nn")
    kind: Any = type(module)
    if not issubclass(kind, nn.QuantizedEmbedding) or module.mode == "affine":
        return

    def look_up(self: Any, ids: Any) -> Any:
        return kind.__call__(self, ids).astype(mx.float32)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": look_up})


def _unpacked(module: Any, *, evaluate: bool) -> Any:
    import mlx.core as mx

    nn: Any = import_module("mlx.nn")
    name = type(module).__name__.removeprefix("Quantized")
    dense = nn.Module()
    # Runtimes keep their packed expert layers beside the dense ones they come from.
    home = nn if hasattr(nn, name) else sys.modules[type(module).__module__]
    dense.__class__ = getattr(home, name)
    dense.weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=module.get("global_scale"),
        dtype=mx.float32,
    )
    if "bias" in module:
        dense.bias = module.bias
    if evaluate:
        mx.eval(dense.parameters())
    return dense


def word_count(config: Mapping[str, Any]) -> int | None:
    """How many logits are of words, where those of places in a picture come after them."""
    if config.get("model_type") != "molmo_point":
        return None
    text = config["text_config"]
    return int(text["vocab_size"]) + int(text["additional_vocab_size"])


def numpy_of(array: Any) -> Logits:
    """An MLX array's values in float32."""
    import mlx.core as mx

    return np.array(array.astype(mx.float32))


@contextlib.contextmanager
def refusals(runtime: str, folder: Path) -> Iterator[None]:
    """Turn what a runtime raises meanwhile into RuntimeRefusal."""
    # Whatever a stock runtime raises on a checkpoint is a finding about the pair, to be reported.
    try:
        yield
    except RuntimeRefusal:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        needs_metal = any(mark in text.lower() for mark in _NEEDS_METAL)
        reason = "it needs Metal, which this machine does not have" if needs_metal else text
        raise RuntimeRefusal(
            f"{runtime} cannot run {folder.name}: {reason}", needs_metal=needs_metal
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The runtimes print and log while they load; a report is the place for what matters.
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
