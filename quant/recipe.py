"""What a quantized weight looks like: format, bits, group size and method."""

from dataclasses import dataclass
from typing import Final, Literal, Self, cast, get_args

from arch_maps.dtypes import itemsize

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Method = Literal["rtn", "mlx", "search", "imatrix", "gptq", "autoround"]

CODED: Final = frozenset({"gptq", "autoround"})
"""Methods whose codes are made by the calibration, from whole matrices."""
CALIBRATED: Final = CODED | {"imatrix"}
"""Methods that need statistics of the activations, and so calibration text."""

AFFINE_BITS: Final = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES: Final = (32, 64, 128)
_DEFAULTS: Final[dict[str, tuple[int, int]]] = {
    "affine": (4, 64),
    "mxfp4": (4, 32),
    "mxfp8": (8, 32),
    "nvfp4": (4, 16),
}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one weight is quantized along its last axis; ValueError where no runtime reads it.

    Method "mlx" gives the codes of mx.quantize on CPU, "rtn" takes them from the scale and bias
    as stored; for the microscaled modes both coincide within the range of the format. "search"
    finds scale and bias by least squares, "imatrix" the same with every input column weighted by
    its mean square activation, and "gptq" rounds to that grid with the errors of earlier columns
    made up for in later ones. "autoround" tunes those codes and grids, of affine mode alone, until
    each block answers as nearly as the release's own as it can.
    """

    mode: Mode
    bits: int
    group_size: int
    method: Method = "rtn"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(
                f"--q-mode {self.mode} is unknown; choose one of {', '.join(get_args(Mode))}"
            )
        if self.method not in get_args(Method):
            raise ValueError(
                f"--q-method {self.method} is unknown here; "
                f"choose one of {', '.join(get_args(Method))}"
            )
        if self.method == "autoround" and self.mode != "affine":
            raise ValueError(
                f"--q-method autoround contradicts --q-mode {self.mode}: it tunes scales and "
                "biases of affine groups; use gptq"
            )
        bits: tuple[int, ...]
        group_sizes: tuple[int, ...]
        if self.mode == "affine":
            bits, group_sizes = AFFINE_BITS, AFFINE_GROUP_SIZES
        else:
            own_bits, own_group_size = _DEFAULTS[self.mode]
            bits, group_sizes = (own_bits,), (own_group_size,)
        if self.bits not in bits:
            raise ValueError(_contradiction("--q-bits", self.bits, self.mode, bits))
        if self.group_size not in group_sizes:
            raise ValueError(
                _contradiction("--q-group-size", self.group_size, self.mode, group_sizes)
            )

    @classmethod
    def make(
        cls,
        mode: str,
        bits: int | None = None,
        group_size: int | None = None,
        method: str = "rtn",
    ) -> Self:
        """A spec with what is not given filled in by the mode (affine: 4 bits, groups of 64)."""
        own_bits, own_group_size = _DEFAULTS.get(mode, (0, 0))
        return cls(
            mode=cast(Mode, mode),
            bits=own_bits if bits is None else bits,
            group_size=own_group_size if group_size is None else group_size,
            method=cast(Method, method),
        )

    def to_config(self) -> dict[str, int | str]:
        """The entry in ``quantization`` of config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def bits_per_weight(self, weight_dtype_code: str) -> float:
        """Stored bits per weight, scales and biases included."""
        shared = 2 * 8 * itemsize(weight_dtype_code) if self.mode == "affine" else 8
        return self.bits + shared / self.group_size

    def output_tensors(
        self, shape: tuple[int, ...], dtype_code: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each stored tensor, by suffix, for a (..., cols) weight.

        Raises ValueError where cols is not a multiple of the group size.
        """
        *leading, columns = shape
        if columns % self.group_size:
            raise ValueError(
                f"a row of {columns} does not divide into groups of {self.group_size}; "
                "choose another --q-group-size or leave the weight unquantized"
            )
        groups = (*leading, columns // self.group_size)
        tensors = {"weight": ("U32", (*leading, columns * self.bits // 32))}
        if self.mode == "affine":
            return tensors | {"scales": (dtype_code, groups), "biases": (dtype_code, groups)}
        return tensors | {"scales": ("U8", groups)}


def _contradiction(flag: str, value: int, mode: str, allowed: tuple[int, ...]) -> str:
    choice = " or ".join(", ".join(map(str, allowed)).rsplit(", ", 1))
    return f"{flag} {value} contradicts --q-mode {mode}, which takes {choice}"
