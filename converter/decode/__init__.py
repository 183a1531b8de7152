"""Decoding the source's own quantization, as a stage before the map.

``decoded`` shows a quantized release as the plain one: the same names, logical shapes, rows on
demand. What each scheme looks like on disk is a module of its own.
"""

from converter.decode.detect import decoded, quantization_settings
from converter.decode.model import BadCodesError, Coded, DecodingReader, View

__all__ = ["BadCodesError", "Coded", "DecodingReader", "View", "decoded", "quantization_settings"]
