"""What mlx-vlm's own processors make of a picture, a sound or a video and a question."""

from importlib import import_module
from pathlib import Path
from typing import Any, Final

from validate.cases import Case, draw, film
from validate.processor import spoken
from validate.reference import read_config
from validate.sounds import synthesise

_IDS_IN_CODE: Final = ("DotsVLProcessor",)
"""Processors that have the token ids of one release in their code; a twin has others."""

FRAMES_PER_SECOND: Final = 2.0
"""The rate at which the runtime's commands take frames from a video."""

_PHI: Final = "mlx_vlm.models.phi4mm.processing_phi4mm"


def load_processor(folder: Path) -> Any:
    """mlx-vlm's processor of a folder, with the image processor that its model package brings."""
    from mlx_vlm.utils import load_image_processor
    from mlx_vlm.utils import load_processor as load_stock

    processor = load_stock(folder, add_detokenizer=False)
    if type(processor).__name__ in _IDS_IN_CODE:
        config = read_config(folder)
        for name in ("image_token_id", "video_token_id"):
            setattr(processor, name, config[name])
    own = load_image_processor(folder)
    if own is not None:
        processor.image_processor = own
    if type(processor).__module__ == _PHI:
        # The constant of a module, which both a release's own and a twin's id must replace.
        package: Any = import_module(_PHI)
        package.AUDIO_TOKEN_INDEX = read_config(folder)["audio_token_index"]
    return processor


def takes_videos(processor: Any) -> bool:
    """Whether a processor of mlx-vlm prepares videos as such; else their frames are pictures."""
    video: Any = import_module("mlx_vlm.generate.video")
    return bool(video.processor_handles_video(processor))


def media_inputs(
    folder: Path, model_config: Any, case: Case, *, stock_prompt: bool
) -> dict[str, Any]:
    """Model inputs for the case, as MLX arrays where the processor makes them.

    The prompt is written by the release's own chat template, or with ``stock_prompt`` by the
    helper that the runtime's command line uses, which has formats of its own.
    """
    from mlx_vlm.prompt_utils import apply_chat_template

    utils: Any = import_module("mlx_vlm.utils")
    processor = load_processor(folder)
    image, sound = case.modality == "image", case.modality == "audio"
    if stock_prompt:
        prompt = apply_chat_template(
            processor, model_config, case.text, num_images=int(image), num_audios=int(sound)
        )
    else:
        # Some of the runtime's processors leave the template to their tokenizer, others write
        # prompts by the stock helper, which puts a sound after its question and leaves out videos.
        tokenizer = getattr(processor, "tokenizer", processor)
        own = getattr(processor, "chat_template", None)
        told = getattr(tokenizer, "chat_template", None)
        speaker = processor if own and (image or not (sound or told)) else tokenizer
        prompt = spoken(speaker, case)
    media: dict[str, Any]
    if image:
        media = {"images": [draw(case)]}
    elif sound:
        media = {"audio": [synthesise(case)]}
    else:
        media = {"videos": [film(case).transpose(0, 3, 1, 2)], "fps": FRAMES_PER_SECOND}
    inputs: dict[str, Any] = utils.prepare_inputs(
        processor,
        **media,
        prompts=prompt,
        image_token_index=getattr(model_config, "image_token_index", None),
        add_special_tokens=utils.should_add_special_tokens(model_config.model_type, processor),
    )
    return {key: value for key, value in inputs.items() if value is not None}
