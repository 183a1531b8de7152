"""The whole study of one model's caches: ours at the bits asked for, the stock runtime's beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Final, Literal

from quant.kv.allocate import CHUNK, MEASURED, allocate, allocated_spec, joint, sensitivity
from quant.kv.measure import Baseline, Forward, baseline, forward_of, loss
from quant.kv.observe import Seen, observed
from quant.kv.runtime import dense_on_cpu, own_caches, takes_quantized
from quant.kv.scan import LayerFacts, effective_bits, spec_for, static_scan
from quant.kv.spec import KvSpec, TensorSpec
from quant.kv.split import TRIES
from quant.kv.turbo import KvError

Choice = Literal["uniform", "turboquant", "auto"]
CHOICES: Final[tuple[Choice, ...]] = ("uniform", "turboquant", "auto")
STEPS: Final = 32
"""Tokens that are decoded one by one, after the prompt."""
SHORT: Final = 512
LONG: Final = 4096 + 2 * SHORT
LEAST: Final = 8 * CHUNK
"""Of fewer tokens too little would be encoded to tell."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Parts of one text, so that nothing is measured on what decided it."""

    lesson: Sequence[int]
    """From which bases are learned; with ``trial`` where there would be little without."""
    trial: Sequence[int]
    """On which layouts and bits are chosen."""
    short: Sequence[int]
    """On which the choice is measured."""
    long: Sequence[int]
    """All of them in order, which ends with ``short``."""

    @classmethod
    def of(cls, ids: Sequence[int]) -> Texts:
        """KvError where ``ids`` are too few to tell."""
        if len(ids) < LEAST:
            raise KvError(f"{len(ids)} tokens of text: a KV study needs {LEAST} or more")
        long = ids[:LONG]
        # Of less than four chunks too little would be encoded to tell.
        part = min(SHORT, max(4 * CHUNK, len(long) // 4))
        cut = len(long) - part
        before = cut - part
        return cls(
            lesson=long[: before if before >= part else cut],
            trial=long[before:cut],
            short=long[cut:],
            long=long,
        )

    def observed(self, model: Any, facts: Sequence[LayerFacts], *, bits: float) -> Seen:
        """What the text shows up to where measuring starts; arguments as of :func:`observed`."""
        before = self.long[: len(self.long) - len(self.short)]
        return observed(model, facts, self.trial, bits=bits, lesson=self.lesson, before=before)

    @property
    def starts(self) -> dict[str, int]:
        """Where measuring starts in ``short``, and in ``long``: what is measured, ``short`` has."""
        return {"short": CHUNK, "long": len(self.long) - len(self.short)}


@dataclass(frozen=True, kw_only=True)
class Stock:
    """One setting of a stock runtime, as its command line spells it."""

    flags: str
    scheme: str
    bits: float
    group: int
    effective_bits: float
    """Of a layer that it quantizes."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was chosen, and what everything costs."""

    spec: KvSpec
    report: dict[str, Any]


def study(
    model: Any,
    ids: Sequence[int],
    *,
    choice: Choice,
    bits: float,
    group: int = 64,
    progress: Callable[[str], None] | None = None,
) -> Study:
    """Choose a spec for a loaded model and measure it on ``ids``, short and long.

    ``bits`` are effective bits on average for "auto", code bits for the others. KvError where no
    layer can be quantized, a head cannot be stored as asked, or the text is too short to tell.
    """
    say = progress or (lambda text: None)
    texts = Texts.of(ids)
    facts = checked(static_scan(model), choice, bits, group)
    report: dict[str, Any] = {"layers": [asdict(fact) for fact in facts]}
    if choice == "auto":
        seen = texts.observed(model, facts, bits=bits)
        measured = sensitivity(model, facts, texts.trial, seen=seen, progress=progress)
        spec = allocated_spec(facts, allocate(facts, measured, bits=bits), seen)
        report["weighed"] = seen.weighed
        report["sensitivity"] = [
            {
                "layer": layer,
                "of": role,
                "basis": "learned" if one.layout.basis else "rotation",
                "bits": one.bits,
                "kl_mean": one.kl,
            }
            for (layer, role), every in sorted(measured.items())
            for one in every
            if one.measured
        ]
    else:
        seen = observed(model, facts, texts.trial, bits=bits)
        spec = spec_for(facts, chooser(choice, bits, group, seen), means=seen.means)
    forward = forward_of(model)
    exact: dict[str, Baseline] = {}
    for name, start in texts.starts.items():
        text = getattr(texts, name)
        say(f"KV cache: {len(text)} tokens with a float cache")
        exact[name] = baseline(
            forward, own_caches(model), text, chunk=CHUNK, start=start, steps=STEPS
        )
    say("KV cache: as chosen")
    report["chosen"] = {
        "scheme": choice,
        "bits": bits,
        "effective_bits": round(effective_bits(spec, facts), 4),
        "aside": kept_aside(spec),
        **{name: joint(model, spec, wanted) for name, wanted in exact.items()},
    }
    report["stock"] = []
    for setting in stock_settings(model, facts):
        say(f"KV cache: {setting.flags}")
        report["stock"].append(stock_row(model, forward, facts, setting, exact))
    return Study(spec=spec, report=report)


def checked(
    facts: tuple[LayerFacts, ...], choice: str, bits: float, group: int = 64
) -> tuple[LayerFacts, ...]:
    """The facts themselves; KvError where no layer's cache can be quantized, or not as asked."""
    if not any(fact.quantizable for fact in facts):
        raise KvError("; ".join(kept_in_float(fact.reason for fact in facts)))
    tensor = tensor_spec(choice, bits, group)
    spec_for(facts, lambda fact: (tensor, tensor))
    return facts


def kept_in_float(reasons: Iterable[str]) -> list[str]:
    """A line for each reason that keeps layers in float; layers that are not have an empty one."""
    return [
        f"{count} layer{'s' * (count > 1)} stay{'s' * (count == 1)} in float: {reason}"
        for reason, count in Counter(filter(None, reasons)).items()
    ]


def tensor_spec(choice: str, bits: float, group: int = 64) -> TensorSpec:
    """How keys and values are stored alike; for "auto" the narrowest that it tries."""
    if choice == "auto":
        return TensorSpec(scheme="turboquant", bits=MEASURED[0], tries=TRIES)
    scheme: Any = choice
    return TensorSpec(scheme=scheme, bits=bits, group=group, tries=TRIES)


def chooser(
    choice: str, bits: float, group: int, seen: Seen
) -> Callable[[LayerFacts], tuple[TensorSpec, TensorSpec]]:
    """Keys and values of every layer alike but for what is stored beside their codes.

    The bytes are those of :func:`tensor_spec` whatever that is.
    """
    plain = tensor_spec(choice, bits, group)

    def tensor(fact: LayerFacts, role: str) -> TensorSpec:
        one = seen.layout(fact, role)
        if choice != "turboquant":
            return plain
        return one.tensor(one.widest(bits * one.dim + 16))

    return lambda fact: (tensor(fact, "key"), tensor(fact, "value"))


def kept_aside(spec: KvSpec) -> list[dict[str, Any]]:
    """The channels that a spec keeps in half precision, by layer, keys and values apart."""
    return [
        {"layer": index, "of": of, "channels": [list(places) for places in tensor.aside]}
        for index, layer in enumerate(spec.layers)
        if layer is not None
        for of, tensor in (("keys", layer.key), ("values", layer.value))
        if tensor.aside
    ]


def stock_settings(model: Any, facts: Sequence[LayerFacts]) -> list[Stock]:
    """The settings of the model's own runtime that are worth measuring."""
    dims = [fact.key_dim for fact in facts if fact.quantizable]
    group = 64 if all(dim % 64 == 0 for dim in dims) else 32
    grouped = f"--kv-group-size {group} --quantized-kv-start 0"
    found = [
        Stock(
            flags=f"--kv-bits {bits} {grouped}",
            scheme="uniform",
            bits=bits,
            group=group,
            effective_bits=bits + 32 / group,
        )
        for bits in (8, 4)
    ]
    if type(model).__module__.startswith("mlx_vlm"):
        for bits in (8.0, 4.0, 3.5):
            found.append(
                Stock(
                    flags=f"--kv-bits {bits:g} --kv-quant-scheme turboquant --quantized-kv-start 0",
                    scheme="turboquant",
                    bits=bits,
                    group=group,
                    effective_bits=bits + 16 / (sum(dims) / len(dims)),
                )
            )
    return found


def stock_row(
    model: Any,
    forward: Forward,
    facts: Sequence[LayerFacts],
    setting: Stock,
    exact: dict[str, Baseline],
) -> dict[str, Any]:
    """The runtime's own caches, quantized by its own function after every chunk as it generates.

    "in_float" are the layers that could be quantized and that it leaves alone, as mlx-vlm's
    turboquant does with the last of three or more; "effective_bits" counts them as such.
    """
    row: dict[str, Any] = {**asdict(setting), "in_float": []}
    try:
        with dense_on_cpu(type(model).__module__.partition(".")[0]):
            for name, wanted in exact.items():
                stepped, live = stock_forward(model, forward, setting), own_caches(model)
                found = loss(stepped, live, wanted)
                row[name] = {part: {"all": one.to_json()} for part, one in found.items()}
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return row
    able = [fact for fact in facts if fact.quantizable]
    plain = [fact for fact in able if takes_quantized(live[fact.index])]
    row["in_float"] = [fact.index for fact in plain]
    total, left = (sum(one.key_dim + one.value_dim for one in some) for some in (able, plain))
    bits = (left * 16.0 + (total - left) * setting.effective_bits) / total
    row["effective_bits"] = round(bits, 4)
    if len(plain) == len(able):
        row["error"] = "it leaves every layer's cache in float"
    return row


def stock_forward(model: Any, forward: Forward, setting: Stock) -> Forward:
    """``forward``, after which the runtime quantizes the caches as it does when it generates."""
    if type(model).__module__.startswith("mlx_vlm"):
        quantize: Any = import_module("mlx_vlm.generate.common").maybe_quantize_kv_cache
        extra: dict[str, Any] = {"kv_quant_scheme": setting.scheme, "kv_bits": setting.bits}
    else:
        quantize = import_module("mlx_lm.generate").maybe_quantize_kv_cache
        extra = {"kv_bits": int(setting.bits)}

    def stepped(ids: Any, caches: list[Any]) -> Any:
        out = forward(ids, caches)
        quantize(caches, quantized_kv_start=0, kv_group_size=setting.group, **extra)
        return out

    return stepped


def flags_for(study: Study) -> list[dict[str, Any]]:
    """Ready-to-paste flags of the stock runtime with their loss, decoding a long text."""
    rows = [row for row in study.report["stock"] if "error" not in row]
    return sorted(
        (
            {
                "flags": row["flags"],
                "effective_bits": row["effective_bits"],
                "kl_mean": row["long"]["decode"]["all"]["kl_mean"],
            }
            for row in rows
        ),
        key=lambda row: float(row["kl_mean"]),
    )
