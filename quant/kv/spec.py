"""What is stored how: one entry per layer, keys and values apart, written to config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from quant.kv.affine import AffineCodec
from quant.kv.basis import Aside
from quant.kv.codec import Codec, FloatCodec
from quant.kv.learned import Learned, read
from quant.kv.rotation import ROUNDS, Rotation
from quant.kv.turbo import KvError, TurboCodec

SCHEMA: Final = 4
Scheme = Literal["float", "uniform", "turboquant", "rotated"]
SCHEMES: Final = get_args(Scheme)
SINKS: Final = 4
"""First tokens that stay in full precision."""
BASES: Final = "model_kv_cache/bases.safetensors"
"""The file of the learned bases. In a folder, because mlx-lm takes every model*.safetensors beside
config.json for weights; called like that, because it fetches no others. mlx-vlm fetches all, and
takes those of the index for weights.
"""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How the keys or the values of one layer are stored.

    ``float`` keeps them; ``uniform`` is affine in groups of ``group`` channels; ``rotated`` the
    same after a rotation; ``turboquant`` rotates and takes centroids, with ``tries`` scales, keeps
    the channels ``aside``, and stores norms in 16 bits or, up to the norm ``top``, in 8. It uses
    the first ``rounds`` of the rotation's transform or, in its place, a learned ``basis`` whose
    units of eight coordinates have ``widths`` bits, and are lengthened for sums of vectors of that
    ``coherence``.
    """

    scheme: Scheme
    bits: float = 16.0
    group: int = 64
    tries: int = 1
    aside: Aside = ()
    top: float = 0.0
    rounds: int = ROUNDS
    basis: Learned | None = None
    widths: tuple[int, ...] = ()
    coherence: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data; the basis by its name."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**plain, "basis": self.basis and self.basis.name}

    @classmethod
    def from_json(cls, stored: dict[str, Any], bases: Mapping[str, Learned]) -> TensorSpec:
        """Read :meth:`to_json`, through JSON; KvError where ``bases`` lacks its basis."""
        name = stored["basis"]
        if name is not None and name not in bases:
            raise KvError(
                f"the settings need the basis {name[:12]}, which is not in the {BASES} given; "
                "it belongs beside config.json: download the whole repo"
            )
        lists = {
            "aside": tuple(tuple(one) for one in stored["aside"]),
            "widths": tuple(stored["widths"]),
        }
        return cls(**{**stored, **lists, "basis": name and bases[name]})

    def codec(self, dim: int, rotation: Rotation) -> Codec:
        """What encodes vectors of ``dim`` channels; KvError where the scheme cannot."""
        if self.scheme == "float":
            return FloatCodec(dim)
        if self.scheme == "turboquant":
            return TurboCodec(
                dim=dim,
                bits=self.bits,
                rotation=rotation.first(self.rounds),
                tries=self.tries,
                aside=self.aside,
                top=self.top,
                learned=self.basis,
                widths=self.widths,
                coherence=self.coherence,
            )
        if self.scheme not in SCHEMES:
            raise KvError(f"no KV scheme {self.scheme!r}; there are {', '.join(SCHEMES)}")
        if self.bits != int(self.bits):
            raise KvError(f"{self.bits} bits: {self.scheme} caches have whole bits")
        basis = rotation if self.scheme == "rotated" else None
        return AffineCodec(dim=dim, bits=int(self.bits), group=self.group, rotation=basis)


FLOAT: Final = TensorSpec(scheme="float")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer's cache.

    The first ``sinks`` tokens and at least the last ``window`` stay in full precision, and all of
    them until there are ``start``;
    ``subtract_mean`` takes the keys' mean off before coding, which softmax cannot see.
    """

    key: TensorSpec
    value: TensorSpec
    sinks: int = SINKS
    window: int = 64
    start: int = 0
    subtract_mean: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**plain, "key": self.key.to_json(), "value": self.value.to_json()}

    @classmethod
    def from_json(cls, stored: dict[str, Any], bases: Mapping[str, Learned]) -> LayerSpec:
        """Read :meth:`to_json`, through JSON."""
        tensors = {name: TensorSpec.from_json(stored[name], bases) for name in ("key", "value")}
        return cls(**{**stored, **tensors})

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.key.scheme == self.value.scheme == "float"


@dataclass(frozen=True, kw_only=True)
class KvSpec:
    """A model's caches: ``layers`` by number (None: not an attention cache, left alone).

    ``rotations`` by head size. ``to_json`` is what goes under ``kv_cache_quantization``, ``bases``
    what goes into the file beside it.
    """

    layers: tuple[LayerSpec | None, ...]
    rotations: dict[int, Rotation] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema versioned."""
        return {
            "schema": SCHEMA,
            "layers": [layer and layer.to_json() for layer in self.layers],
            "rotations": {str(dim): r.to_json() for dim, r in sorted(self.rotations.items())},
        }

    @property
    def bases(self) -> dict[str, Learned]:
        """The learned bases by name."""
        tensors = (t for layer in self.layers if layer for t in (layer.key, layer.value))
        return {tensor.basis.name: tensor.basis for tensor in tensors if tensor.basis}

    @classmethod
    def load(cls, folder: Path) -> KvSpec:
        """The settings of a checkpoint; KvError where they are not, or not as they were written."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise KvError(f"{folder}: config.json cannot be read: {error}") from error
        if "kv_cache_quantization" not in config:
            raise KvError(
                f"{folder}: config.json has no kv_cache_quantization; `convert kv` writes it"
            )
        file = folder / BASES
        try:
            bases = read(file) if file.is_file() else {}
        except ValueError as error:
            raise KvError(str(error)) from error
        try:
            return cls.from_json(config["kv_cache_quantization"], bases)
        except (AttributeError, KeyError, TypeError) as error:
            raise KvError(
                f"{folder}: kv_cache_quantization in config.json is damaged ({error!r}); "
                "`convert kv` writes it anew"
            ) from error

    @classmethod
    def from_json(
        cls, stored: dict[str, Any], bases: Mapping[str, Learned] | None = None
    ) -> KvSpec:
        """Read :meth:`to_json`; KvError for another schema version, or a basis that is missing."""
        if stored.get("schema") != SCHEMA:
            raise KvError(
                f"kv_cache_quantization has schema {stored.get('schema')}, not {SCHEMA}; "
                "`convert kv` writes it anew"
            )
        layers = tuple(
            None if layer is None else LayerSpec.from_json(layer, bases or {})
            for layer in stored["layers"]
        )
        rotations = {int(dim): Rotation.from_json(r) for dim, r in stored["rotations"].items()}
        return cls(layers=layers, rotations=rotations)

    def rotation(self, dim: int) -> Rotation:
        """The rotation of heads of ``dim`` channels."""
        return self.rotations.setdefault(dim, Rotation.random(dim, seed=dim))
