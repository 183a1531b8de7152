"""Taking documented faults out of how a runtime prepares and hears sounds, in memory.

Each function returns patches (module, attribute, what belongs there), given the loaded model.
"""

from importlib import import_module
from typing import Any, Final

import numpy as np

Patch = tuple[Any, str, Any]

INKLING_FLOOR: Final = 1e-5
"""Inkling's least magnitude of a frequency: the root of the least power, 1e-10."""


def inkling_sounds(model: Any) -> list[Patch]:
    """The release's floor of a magnitude, where mlx-vlm has that of a power."""
    del model
    mx: Any = import_module("mlx.core")
    module: Any = import_module("mlx_vlm.models.inkling.audio_feature_extractor")
    stft = module.stft

    def floored(*args: Any, **settings: Any) -> Any:
        return mx.maximum(mx.abs(stft(*args, **settings)), INKLING_FLOOR)

    return [(module, "stft", floored)]


def gemma4_sounds(model: Any) -> list[Patch]:
    """As many tokens as the convolutions leave frames, and a window rounded once."""
    del model
    processors: Any = import_module("mlx_vlm.models.gemma4.processing_gemma4")
    extractors: Any = import_module("mlx_vlm.models.gemma4.audio_feature_extractor")
    extractor = extractors.Gemma4AudioFeatureExtractor
    stock = extractor._extract_spectrogram

    def exact_window(self: Any, waveform: Any, attention_mask: Any) -> Any:
        phase = 2.0 * np.pi * np.arange(self.frame_length) / self.frame_length
        self.window = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
        return stock(self, waveform, attention_mask)

    def tokens(self: Any, waveform: Any, sampling_rate: int) -> int:
        del sampling_rate
        features = self.feature_extractor([np.asarray(waveform)])
        frames = int(np.sum(features["input_features_mask"][0]))
        for _ in range(2):
            frames = -(-frames // 2)
        return min(frames, int(self.audio_seq_length))

    return [
        (extractor, "_extract_spectrogram", exact_window),
        (processors.Gemma4Processor, "_compute_audio_num_tokens", tokens),
    ]
