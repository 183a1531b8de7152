"""Nemotron 3 Nano Omni as transformers has it, under the type of NVIDIA's later omni releases."""

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.models import nemotron_h_omni as release

PARTS: Final = {
    "image_processor": "NemotronH_Omni_Reasoning_V3ImageProcessor",
    "feature_extractor": "ParakeetFeatureExtractor",
}
BESIDE: Final = (
    r"feature_extractor\.featurizer\.",
    r"num_batches_tracked$",
    r"input_conditioner\.",
)
"""Tensors that the class has no place for, or that change nothing it computes."""


def torch_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The release's config.json in the terms of transformers, as the map spells it."""
    return release.MAP.config(dict(config), Facts(config))


def settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The number of mel bins, which the release's files state for the encoder alone."""
    sounds = config.get("sound_config") or {}
    return {"feature_extractor": {"feature_size": int(sounds.get("num_mel_bins", 128))}}


def processor() -> type:
    """The processor's class."""
    found: type = import_module("transformers").NemotronH_Omni_Reasoning_V3Processor
    return found


def watch(model: Any) -> None:
    """Let a loaded class take videos, which that of transformers 5.23 fails at in two places.

    It joins the features of a video as if it had a list of them, and compares tokens as if each
    were a pair of frames when it leaves out those that hardly change.
    """
    module: Any = import_module("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")
    keep, stock = module.compute_retention_mask, model.get_video_features
    if "thw" not in signature(keep).parameters:
        return
    shape: list[int] = []

    def features(*arguments: Any, **settings: Any) -> Any:
        found = stock(*arguments, **settings)
        shape[:] = found.pooler_output.shape[:2]
        found.pooler_output = tuple(found.pooler_output)
        return found

    def kept(*, video_embeds: Any, thw: Any, spatial_merge_size: int, q: float) -> Any:
        del thw
        return keep(
            video_embeds=video_embeds,
            thw=(*shape, 1),
            spatial_merge_size=spatial_merge_size,
            q=q,
        )

    model.get_video_features = features
    module.compute_retention_mask = kept


def lighten(model: Any) -> None:
    """Take out of a class that is built without weights what no release has any of.

    That is layer scales of one, counters of training, and integers that follow from the config.
    """
    torch: Any = import_module("torch")
    for module in list(model.modules()):
        for name in ("layer_scale1", "layer_scale2"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
        if isinstance(module, torch.nn.BatchNorm1d):
            module.num_batches_tracked = None
        if "summary_idxs" in module._buffers:
            indices = torch.tensor(module.config.summary_idxs)
            module.register_buffer("summary_idxs", indices, persistent=False)


def complete(model: Any, folder: Path) -> None:
    """The class computes all that the release does."""
    del model, folder
