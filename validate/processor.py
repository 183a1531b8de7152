"""A release's own tokenizer and processor, as transformers loads them.

Images are prepared with Pillow, not torchvision: both belong to the release, and Pillow's
resampling is the one that needs no further library.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from validate.cases import Case, draw, picture_question
from validate.reference import ReferenceError, read_config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any | None:
    """The folder's tokenizer, or None when it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )


def processor_class(folder: Path) -> Any:
    """transformers' own processor class for a folder.

    Not through AutoProcessor: MLX runtimes replace its ``from_pretrained`` with their own.
    """
    import transformers

    auto: Any = import_module("transformers.models.auto.processing_auto")

    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / file
        name = json.loads(path.read_text("utf-8")).get("processor_class") if path.exists() else None
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    name = auto.PROCESSOR_MAPPING_NAMES.get(read_config(folder).get("model_type", ""))
    if name is None:
        raise ReferenceError(f"{folder}: transformers has no processor for this model_type")
    return getattr(transformers, name)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The release's processor with Pillow image preparation.

    Built from its parts, because ``from_pretrained`` would insist on torchvision for the video
    part, which no check here uses.
    """
    images: Any = import_module("transformers").AutoImageProcessor
    cls = processor_class(folder)
    settings, _ = cls.get_processor_dict(folder, local_files_only=True)
    parts: list[Any] = []
    for attribute in cls.get_attributes():
        if attribute == "tokenizer":
            parts.append(load_tokenizer(folder, trust_remote_code=trust_remote_code))
        elif attribute == "image_processor":
            parts.append(
                images.from_pretrained(
                    folder,
                    backend="pil",
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                )
            )
        elif attribute == "video_processor":
            parts.append(NoVideo(parts))
        else:
            raise ReferenceError(f"{cls.__name__}: no way to load its {attribute}")
    return _accepting(cls).from_args_and_dict(parts, settings)


class NoVideo:
    """Stands where the video processor belongs, with the image processor's settings."""

    num_frames = fps = 1

    def __init__(self, parts: Sequence[Any]) -> None:
        for part in parts:
            if hasattr(part, "image_mean") or hasattr(part, "patch_size"):
                vars(self).update({k: v for k, v in vars(part).items() if k[0] != "_"})


def _accepting(cls: Any) -> Any:
    """The processor class, made to take a NoVideo for its video part."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideo):
            return NoVideo
        return cls.check_argument_for_proper_class(self, argument_name, argument)

    def described(self: Any) -> str:
        return f"{cls.__name__} without its video part"

    return type(
        cls.__name__, (cls,), {"check_argument_for_proper_class": check, "__repr__": described}
    )


def image_inputs(folder: Path, case: Case, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Model inputs for a picture and a question, made by the release's own processor."""
    try:
        processor = load_processor(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise ReferenceError(f"{folder}: its processor cannot be loaded here: {error}") from error
    prompt = processor.apply_chat_template(
        picture_question(case), add_generation_prompt=True, tokenize=False
    )
    return dict(processor(text=[prompt], images=[draw(case)], return_tensors="pt"))


def tokenize(tokenizer: Any, case: Case) -> list[int] | None:
    """Token ids of a text or a conversation; None for a conversation without a template."""
    if not case.messages:
        return list(tokenizer.encode(case.text))
    if not tokenizer.chat_template:
        return None
    text = tokenizer.apply_chat_template(
        case.conversation(), add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))
