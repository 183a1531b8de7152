"""Positions of a video's tokens as its release counts them, in a loaded mlx-vlm model.

What a config leaves out is as transformers' configuration classes have it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from validate.fault import Patch

Config = Mapping[str, Any]


def qwen2_5_vl(model: Any, config: Config) -> list[Patch]:
    """Temporal positions that go on by ``tokens_per_second`` for each second.

    What follows a video goes on from its width and height, as transformers has it.
    """
    rate = int(config["vision_config"].get("tokens_per_second", 4))
    language = model.language_model
    timed = _timed(language.get_rope_index, config["video_token_id"], rate, pushed=False)
    return [(language, "get_rope_index", timed)]


def qwen3_omni(model: Any, config: Config) -> list[Patch]:
    """Temporal positions that go on by ``position_id_per_seconds``, and text after the last one."""
    thinker = config["thinker_config"]
    language = model.thinker.language_model
    rate = int(thinker.get("position_id_per_seconds", 25))
    timed = _timed(language.get_rope_index, thinker["video_token_id"], rate, pushed=True)
    return [(language, "get_rope_index", timed)]


def _timed(
    stock: Callable[..., tuple[Any, Any]], video: int, rate: int, *, pushed: bool
) -> Callable[..., tuple[Any, Any]]:
    """``stock`` for a prompt of one video of two frames to the second, a grid of two a second.

    ``rate``: positions for each grid. ``pushed``: the text after goes on from the last of them.
    """

    def positions(ids: Any, *others: Any, **more: Any) -> tuple[Any, Any]:
        import mlx.core as mx

        found, deltas = stock(ids, *others, **more)
        of_video = ids == video
        if found.ndim != 3 or not of_video.any():
            return found, deltas
        last = mx.where(of_video, found, 0).max()
        first = mx.where(of_video, found[0], found[0].max()).min()
        time = mx.where(of_video, first + (found[0] - first) * rate, found[0])
        found = mx.stack([time, found[1], found[2]])
        if pushed:
            more_by = mx.maximum(mx.where(of_video, time, 0).max() - last, 0)
            places = mx.arange(ids.shape[1])
            after = places > mx.where(of_video[0], places, 0).max()
            found, deltas = found + mx.where(after, more_by, 0), deltas + more_by
        return found, deltas

    return positions
