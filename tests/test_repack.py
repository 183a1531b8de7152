"""Which map ops let codes through, judged on one small matrix in groups of 32."""

import pytest

from arch_maps.ops import Affine, Concat, Constant, LowRank, Permute, Reshape, Slice, Source, Stack
from converter.decode import Coded
from converter.decode.model import Native
from converter.plan.repack import Repack, repack
from quant.recipe import QuantSpec

SPEC = QuantSpec.make("affine", 4, 32)
W, V, ODD = (Source(name, (4, 64)) for name in ("w", "v", "odd"))
TURNED = Source("turned", (2, 64, 4))


def coded(name, stored=(4, 64), spec=SPEC, axes=None):
    native = Native(spec=spec, scales="BF16")
    return Coded(
        name=name, stored=stored, reads=(name,), codec=None, form="", axes=axes, native=native
    )


CODED = {
    "w": coded("w"),
    "v": coded("v"),
    "odd": coded("odd", spec=QuantSpec.make("affine", 8, 32)),
    "turned": coded("turned", (2, 4, 64), axes=(0, 2, 1)),
}


@pytest.mark.parametrize(
    ("expr", "weight", "scales"),
    [
        (W, (4, 8), (4, 2)),
        (Slice(W, 0, 1, 3), (2, 8), (2, 2)),
        (Concat((W, V), 0), (8, 8), (8, 2)),
        (Concat((W, V), 1), (4, 16), (4, 4)),
        (Stack((W, V)), (2, 4, 8), (2, 4, 2)),
        (Stack((W, V), 1), (4, 2, 8), (4, 2, 2)),
        (Reshape(W, (2, 2, 64)), (2, 2, 8), (2, 2, 2)),
        (Permute(Reshape(W, (2, 2, 64)), (1, 0, 2)), (2, 2, 8), (2, 2, 2)),
        (Permute(TURNED, (0, 2, 1)), (2, 4, 8), (2, 4, 2)),
    ],
)
def test_whole_rows_move(expr, weight, scales):
    made = repack(expr, CODED, "BF16")
    assert isinstance(made, Repack), made
    assert made.spec == SPEC
    assert made.parts["weight"].shape == weight
    assert made.parts["scales"].shape == made.parts["biases"].shape == scales
    assert made.rounding == ""


@pytest.mark.parametrize(
    ("expr", "why"),
    [
        (Slice(W, 1, 0, 32), "does not move its rows"),
        (Permute(W, (1, 0)), "does not move its rows"),
        (Permute(Reshape(W, (4, 2, 32)), (1, 0, 2)), "does not move its rows"),
        (Reshape(W, (8, 32)), "does not move its rows"),
        (TURNED, "does not move its rows"),
        (Affine(W, offset=1.0), "does not move its rows"),
        (LowRank(W, Source("v", (4, 64)), Source("w", (64, 64))), "does not move its rows"),
        (Concat((W, ODD)), "quantized in different ways"),
        (Concat((W, Source("plain", (4, 64)))), "no counterpart"),
        (Constant((4, 64), 1.0), "no counterpart"),
    ],
)
def test_what_cuts_or_computes_is_decoded(expr, why):
    found = repack(expr, CODED, "BF16")
    assert isinstance(found, str)
    assert why in found


def test_rounding_is_said():
    native = Native(spec=SPEC, scales="F16", products=True)
    assert native.rounding("F32") == ""
    assert native.rounding("F16") == "biases rounded to F16"
    assert native.rounding("BF16") == "scales and biases rounded to BF16"
    assert Native(spec=QuantSpec.make("mxfp4")).rounding("BF16") == ""
