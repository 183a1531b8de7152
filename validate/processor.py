"""A release's own tokenizer and processor, as transformers loads them.

Images are prepared with Pillow, not torchvision: both belong to the release, and Pillow's
resampling is the one that needs no further library.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from validate.cases import Case, draw, media_question
from validate.libraries import missing_library
from validate.reference import ReferenceError, borrowed_settings, model_class, read_config
from validate.runtime import RUNTIMES
from validate.sounds import SAMPLING_RATE, synthesise
from validate.stand_ins import StandIn, stand_in

if TYPE_CHECKING:
    from PIL.Image import Image


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any | None:
    """The folder's tokenizer, or None when it has none; ReferenceError when it does not load."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **borrowed_settings(model_class(folder), read_config(folder)),
        )
    # It reads config.json first, where the settings of a type that it does not know may upset it.
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ReferenceError(
            f"{folder}: transformers cannot load its tokenizer: {error}"
        ) from error


def processor_class(folder: Path) -> Any:
    """transformers' own processor class for a folder.

    Not through AutoProcessor: MLX runtimes replace its ``from_pretrained`` with their own.
    """
    import transformers

    other = stand_in(read_config(folder))
    if other is not None:
        return other.processor()
    auto: Any = import_module("transformers.models.auto.processing_auto")

    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / file
        name = json.loads(path.read_text("utf-8")).get("processor_class") if path.exists() else None
        if name and hasattr(transformers, name):
            return _untouched(getattr(transformers, name))
    name = auto.PROCESSOR_MAPPING_NAMES.get(read_config(folder).get("model_type", ""))
    if name is None:
        raise ReferenceError(f"{folder}: transformers has no processor for this model_type")
    return _untouched(getattr(transformers, name))


def _untouched(cls: Any) -> Any:
    """The class as transformers has it, where an MLX runtime has put functions of its own in it."""
    homes = {getattr(value, "__module__", None) or "" for value in vars(cls).values()}
    if not any(home.partition(".")[0] in RUNTIMES for home in homes):
        return cls
    spec = find_spec(cls.__module__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, cls.__name__)


def load_processor(
    folder: Path, *, modality: str = "image", trust_remote_code: bool = False
) -> Any:
    """The release's processor with Pillow image preparation, to prepare one kind of media.

    Built from its parts, because ``from_pretrained`` would insist on torchvision for the video
    part, which no check here uses, and for an image part that sounds can do without.
    """
    cls, other = processor_class(folder), stand_in(read_config(folder))
    settings, _ = cls.get_processor_dict(folder, local_files_only=True)
    parts: list[Any] = []
    for attribute in cls.get_attributes():
        if attribute == "tokenizer":
            parts.append(load_tokenizer(folder, trust_remote_code=trust_remote_code))
            if other is not None:
                _name_tokens(parts[-1], other)
        elif other is not None and attribute in other.parts:
            unused = attribute == "image_processor" and modality != "image"
            parts.append(NoVideo(()) if unused else _part(folder, other, attribute))
        elif attribute == "image_processor":
            parts.append(_images(folder, modality, trust_remote_code=trust_remote_code))
        elif attribute == "video_processor":
            parts.append(NoVideo(parts))
        elif attribute in ("feature_extractor", "audio_processor"):
            parts.append(_sounds(folder, modality, trust_remote_code=trust_remote_code))
        else:
            raise ReferenceError(f"{cls.__name__}: no way to load its {attribute}")
    processor = _accepting(cls).from_args_and_dict(parts, settings)
    for part in parts:  # older releases keep the template with the tokenizer
        if processor.chat_template is None:
            processor.chat_template = getattr(part, "chat_template", None)
    return processor


def _part(folder: Path, other: StandIn, attribute: str) -> Any:
    cls: Any = getattr(import_module("transformers"), other.parts[attribute])
    told = other.settings(read_config(folder)).get(attribute, {})
    part = cls.from_pretrained(folder, local_files_only=True)
    return cls.from_dict({**part.to_dict(), **told}) if told else part


def _name_tokens(tokenizer: Any, other: StandIn) -> None:
    for name, token in other.tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))


def _images(folder: Path, modality: str, *, trust_remote_code: bool) -> Any:
    images: Any = import_module("transformers").AutoImageProcessor
    try:
        return images.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ImportError, ValueError) as error:
        if modality == "image" or missing_library(error) is None:
            raise
        return NoVideo(())


def _sounds(folder: Path, modality: str, *, trust_remote_code: bool) -> Any:
    """What hears; of a release that only sees, whose processor's class can do both, nothing."""
    sounds: Any = import_module("transformers").AutoFeatureExtractor
    try:
        return sounds.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):
        if modality == "audio":
            raise
        return NoVideo(())


class NoVideo:
    """Stands where a part belongs that is not used, with the image processor's settings."""

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


def media_inputs(folder: Path, case: Case, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Model inputs for a picture or a sound and a question, by the release's own processor."""
    try:
        processor = load_processor(
            folder, modality=case.modality, trust_remote_code=trust_remote_code
        )
    except (ImportError, ValueError) as error:
        if isinstance(error, ValueError) and missing_library(error) is None:
            raise
        raise ReferenceError(f"{folder}: its processor cannot be loaded here: {error}") from error
    if case.modality == "image":
        return picture_inputs(processor, draw(case), case.text)
    media = {"audio": [synthesise(case)], "sampling_rate": SAMPLING_RATE}
    return dict(processor(text=[spoken(processor, case)], **media, return_tensors="pt"))


def picture_inputs(processor: Any, picture: "Image", question: str) -> dict[str, Any]:
    """Model inputs for a picture and a question, as one user turn."""
    prompt = spoken(processor, Case(name="picture", modality="image", text=question))
    return dict(processor(text=[prompt], images=[picture], return_tensors="pt"))


def spoken(speaker: Any, case: Case) -> str:
    """The question as a processor's chat template writes it, or bare where it has none."""
    if getattr(speaker, "chat_template", None) is None:
        return case.text
    prompt: str = speaker.apply_chat_template(
        media_question(case), add_generation_prompt=True, tokenize=False
    )
    return prompt


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
