"""Files to look at and listen to: generated, small, and each with a twin that differs."""

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from validate.cases import MEDIA_FILES, draw, load_cases
from validate.sounds import SAMPLING_RATE, synthesise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FPS: Final = 2.0
_FRAMES: Final = 4
_FRAME: Final = 112
"""Side of a video frame, pixels."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """Paths of a picture, a sound and a video, and of others with other content."""

    image: Path
    other_image: Path
    audio: Path
    other_audio: Path
    video: Path
    other_video: Path


def make_media(folder: Path, *, image: Path | None = None) -> Media:
    """Write the files; ``image`` takes the place of the generated picture."""
    import numpy as np
    from PIL import Image, ImageOps

    picture = draw(load_cases(MEDIA_FILES["image"])[0])
    if image is not None:
        picture = Image.open(image).convert("RGB")
    sound = synthesise(load_cases(MEDIA_FILES["audio"])[1])
    small = np.asarray(picture.resize((_FRAME, _FRAME)))
    frames = [np.roll(small, 8 * step, axis=1) for step in range(_FRAMES)]
    made = Media(
        image=folder / "picture.png",
        other_image=folder / "other-picture.png",
        audio=folder / "sound.wav",
        other_audio=folder / "other-sound.wav",
        video=folder / "video.mp4",
        other_video=folder / "other-video.mp4",
    )
    picture.save(made.image)
    ImageOps.invert(picture).save(made.other_image)
    _write_sound(made.audio, sound)
    _write_sound(made.other_audio, sound[::-1])
    _write_video(made.video, frames)
    _write_video(made.other_video, [255 - frame for frame in frames])
    return made


def _write_sound(path: Path, sound: "NDArray[np.float32]") -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def _write_video(path: Path, frames: Sequence[Any]) -> None:
    import cv2

    cv: Any = cv2  # installed with mlx-vlm, which reads videos with it
    height, width = frames[0].shape[:2]
    writer = cv.VideoWriter(str(path), cv.VideoWriter_fourcc(*"mp4v"), _FPS, (width, height))
    for frame in frames:
        writer.write(frame[:, :, ::-1].copy())
    writer.release()
