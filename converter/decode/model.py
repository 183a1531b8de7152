"""The decoded view of a release: plain tensors, and how their rows come out of what is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from arch_maps.ops import Shape
from arch_maps.rules import Drop
from converter.errors import ConvertError
from converter.source import Source
from quant.decode.block import Block, CodingError
from quant.recipe import QuantSpec


class BadCodesError(ConvertError):
    """A quantized tensor holds what its format does not allow; the message names it."""

    exit_code = 3


class RawReader(Protocol):
    """Gives the stored bytes of a release."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` along axis 0."""

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns ``[start, stop)`` of a matrix."""


class Codec(Protocol):
    """Turns stored rows into values; ``start`` and ``stop`` count rows of axis 0."""

    def values(self, raw: RawReader, start: int, stop: int, dtype: str) -> np.ndarray:
        """The values of rows, with the last axis as the format groups it."""


class BlockCodec:
    """A codec that says what its rows hold; decoding and repacking follow from that."""

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows as codes, zeros and scales, all leading axes flattened."""
        raise NotImplementedError

    def values(self, raw: RawReader, start: int, stop: int, dtype: str) -> np.ndarray:
        """(rows, cols) values in ``dtype``."""
        return self.block(raw, start, stop).values(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """A format of MLX's that holds a tensor's codes as they are."""

    spec: QuantSpec
    scales: str = ""
    """Storage dtype of the source's scales; of no account where MLX has a byte for them."""
    products: bool = False
    """Whether biases are products of zero point and scale, which need more bits than a scale."""

    def rounding(self, dtype: str) -> str:
        """What storing scales and biases in ``dtype`` loses, in words; empty for nothing."""
        if self.spec.mode != "affine" or dtype == "F32":
            return ""
        if self.scales != dtype:
            return f"scales and biases rounded to {dtype}"
        return f"biases rounded to {dtype}" if self.products else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A quantized tensor under the name and shape it would have unquantized."""

    name: str
    stored: Shape
    """Its shape as the format orders it, groups along the last axis."""
    reads: tuple[str, ...]
    """Tensors of the release that it is made from, the codes first."""
    codec: Codec
    form: str
    """What it is stored as, in words."""
    axes: tuple[int, ...] | None = None
    """How the logical axes follow from the stored ones; the first stays the first."""
    native: Native | None = None

    @property
    def shape(self) -> Shape:
        """The logical shape."""
        return self.stored if self.axes is None else tuple(self.stored[i] for i in self.axes)

    def rows(self, raw: RawReader, start: int, stop: int, dtype: str) -> np.ndarray:
        """Logical rows ``[start, stop)`` in ``dtype``; raises BadCodesError."""
        try:
            values = self.codec.values(raw, start, stop, dtype)
        except CodingError as error:
            raise self._bad(start, error) from error
        return self._logical(values.reshape(stop - start, *self.stored[1:]))

    def repacked(self, raw: RawReader, start: int, stop: int, role: str, dtype: str) -> np.ndarray:
        """Rows of MLX's stored tensor ``role``, axes as the logical tensor has them."""
        assert self.native is not None
        assert isinstance(self.codec, BlockCodec)
        try:
            block = self.codec.block(raw, start, stop, codes=role == "weight")
            part = block.repacked(self.native.spec, dtype, role)
        except CodingError as error:
            raise self._bad(start, error) from error
        return self._logical(part.reshape(stop - start, *self.stored[1:-1], part.shape[-1]))

    def _logical(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.axes is None else rows.transpose(self.axes)

    def _bad(self, start: int, error: CodingError) -> BadCodesError:
        return BadCodesError(f"{self.reads[0]}, rows from {start}: {error}")


@dataclass(frozen=True, kw_only=True)
class View:
    """A release as it would be without its quantization."""

    source: Source
    """Plain tensors; its config has no quantization settings."""
    coded: Mapping[str, Coded] = field(default_factory=dict)
    drops: tuple[Drop, ...] = ()
    """Tensors that the scheme adds and nothing here needs, with reasons."""
    settings: dict[str, Any] | None = None
    """The quantization settings as the release states them; None where it is not quantized."""

    @property
    def method(self) -> str:
        """The scheme's name."""
        return str((self.settings or {}).get("quant_method", ""))


class DecodingReader:
    """Rows of a release with its quantized tensors decoded, or repacked for MLX.

    ``NAME@ROLE:DTYPE`` reads MLX's stored tensor ROLE of the coded tensor NAME, its scales and
    biases in DTYPE.
    """

    def __init__(self, raw: RawReader, view: View) -> None:
        """Read the bytes of the release from ``raw``."""
        self._raw = raw
        self._view = view

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor."""
        coded = self._view.coded.get(name)
        if coded is not None:
            return coded.rows(self._raw, start, stop, self._view.source.tensors[name].dtype)
        base, at, rest = name.rpartition("@")
        if at and base in self._view.coded:
            role, _, dtype = rest.partition(":")
            return self._view.coded[base].repacked(self._raw, start, stop, role, dtype)
        return self._raw.read_rows(name, start, stop)


def elements(shape: Shape) -> int:
    """Elements of a tensor."""
    return math.prod(shape)
