"""Generated sounds: what parity runs let both sides hear."""

from typing import TYPE_CHECKING, Final

from validate.cases import Case

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLING_RATE: Final = 16000
_LOW, _HIGH = 180.0, 3600.0
_TONES: Final = ((440.0, 0.2), (1250.0, 0.1), (2900.0, 0.05))


def synthesise(case: Case) -> "NDArray[np.float32]":
    """A deterministic mono waveform in [-1, 1] at 16 kHz: a rising chirp, three tones, a pause.

    Nothing repeats within a frame, so that frames that are swapped, dropped or shifted show.
    """
    import numpy as np

    count = case.samples
    time = np.arange(count, dtype=np.float64) / SAMPLING_RATE
    sweep = (_HIGH - _LOW) * time**2 / (2 * max(time[-1], 1 / SAMPLING_RATE))
    wave = 0.4 * np.sin(2 * np.pi * (_LOW * time + sweep))
    for pitch, loudness in _TONES:
        beat = 0.5 + 0.5 * np.sin(2 * np.pi * pitch / 300.0 * time)
        wave += loudness * beat * np.sin(2 * np.pi * pitch * time)
    wave[count * 5 // 9 : count * 6 // 9] *= 0.02
    sound: NDArray[np.float32] = wave.astype(np.float32)
    return sound
