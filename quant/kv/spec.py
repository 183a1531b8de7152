"""What is stored how: one entry per layer, keys and values apart, written to config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

from quant.kv.affine import AffineCodec
from quant.kv.aside import Aside
from quant.kv.codec import Codec, FloatCodec
from quant.kv.rotation import Rotation
from quant.kv.turbo import KvError, TurboCodec

SCHEMA: Final = 2
Scheme = Literal["float", "uniform", "turboquant", "rotated"]
SCHEMES: Final = get_args(Scheme)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How the keys or the values of one layer are stored.

    ``float`` keeps them; ``uniform`` is affine in groups of ``group`` channels; ``rotated`` the
    same after a rotation; ``turboquant`` rotates and takes centroids, with ``tries`` scales, keeps
    the channels ``aside``, and stores norms in 16 bits or, up to the norm ``top``, in 8.
    """

    scheme: Scheme
    bits: float = 16.0
    group: int = 64
    tries: int = 1
    aside: Aside = ()
    top: float = 0.0

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> TensorSpec:
        """Read what ``asdict`` made of one, through JSON."""
        return cls(**{**stored, "aside": tuple(tuple(one) for one in stored["aside"])})

    def codec(self, dim: int, rotation: Rotation) -> Codec:
        """What encodes vectors of ``dim`` channels; KvError where the scheme cannot."""
        if self.scheme == "float":
            return FloatCodec(dim)
        if self.scheme == "turboquant":
            return TurboCodec(
                dim=dim,
                bits=self.bits,
                rotation=rotation,
                tries=self.tries,
                aside=self.aside,
                top=self.top,
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
    sinks: int = 4
    window: int = 64
    start: int = 0
    subtract_mean: bool = True

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> LayerSpec:
        """Read what ``asdict`` made of one, through JSON."""
        tensors = {name: TensorSpec.from_json(stored[name]) for name in ("key", "value")}
        return cls(**{**stored, **tensors})

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.key.scheme == self.value.scheme == "float"


@dataclass(frozen=True, kw_only=True)
class KvSpec:
    """A model's caches: ``layers`` by number (None: not an attention cache, left alone).

    ``rotations`` by head size. ``to_json`` is what goes under ``kv_cache_quantization``.
    """

    layers: tuple[LayerSpec | None, ...]
    rotations: dict[int, Rotation] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema versioned."""
        return {
            "schema": SCHEMA,
            "layers": [None if layer is None else asdict(layer) for layer in self.layers],
            "rotations": {str(dim): r.to_json() for dim, r in sorted(self.rotations.items())},
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> KvSpec:
        """Read :meth:`to_json`; KvError for another schema version."""
        if stored.get("schema") != SCHEMA:
            raise KvError(
                f"kv_cache_quantization has schema {stored.get('schema')}, not {SCHEMA}; "
                "`convert kv` writes it anew"
            )
        layers = tuple(
            None if layer is None else LayerSpec.from_json(layer) for layer in stored["layers"]
        )
        rotations = {int(dim): Rotation.from_json(r) for dim, r in stored["rotations"].items()}
        return cls(layers=layers, rotations=rotations)

    def rotation(self, dim: int) -> Rotation:
        """The rotation of heads of ``dim`` channels."""
        return self.rotations.setdefault(dim, Rotation.random(dim, seed=dim))
