"""What KV-cache schemes cost on models, ours beside the stock runtime's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TWINS = ("qwen3", "qwen2", "qwen2-64", "minicpmv4_6", "gemma4")
MODELS = ("tinylm", "rotated", *TWINS, "spike", "spike-64")
"""`-64`: with heads of 64 channels, as in the smallest releases, where twins have 32."""
_SPIKE = 900.0
_TWIN_TOKENS = (1504, 2048)
"""Of the texts that twins read; all settings read the first of the first length."""
_STEPS = 128
"""Tokens decoded one by one: four times what a study takes, for a closer look."""
_TEXTS = 3
"""Texts of each model; those after the first are read by two settings only."""
Row = dict[str, Any]


def losses(name: str) -> Iterator[Row]:
    """One of MODELS: a trained one, twins, one with a spike in its key biases, rotated values."""
    from converter.pipeline import Request, convert
    from converter.ui import Console
    from validate.twin import Sizes, load_example, make_twin

    trained = ROOT / "tests" / "fixtures" / "tinylm"
    kind, _, wide = name.partition("-")
    model_type = "qwen2" if kind == "spike" else kind
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if name == "rotated":
            yield from _rotated(trained, place, _text(trained))
            return
        source = trained
        if name != "tinylm":
            source = place / "twin"
            sizes = Sizes(hidden=256) if wide else Sizes()
            make_twin(load_example(model_type), source, sizes=sizes)
        convert(Request(hf_path=str(source), mlx_path=place / "out"), Console(quiet=True))
        model, label = _loaded(place / "out"), f"{model_type} twin"
        if wide:
            label = f"{label}, heads of {wide}"
        if kind == "spike":
            _spike(model)
            label = f"{label}, a key bias of norm {_SPIKE:.0f}"
        if name == "tinylm":
            label = "tinylm (trained)"
        texts = [
            _text(trained, part) if name == "tinylm" else _random(part, tokens)
            for tokens in (_TWIN_TOKENS[:1] if name == "tinylm" else _TWIN_TOKENS)
            for part in range(_TEXTS)
        ]
        yield from _model(label, model, texts)


def _random(seed: int, tokens: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(5, 500, tokens)]


def _text(folder: Path, part: int = 0) -> list[int]:
    """As many tokens of a held-out text as a study takes, from its beginning to its end."""
    from quant.kv.study import LONG
    from validate.processor import load_tokenizer

    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    start = part * (len(ids) - LONG) // (_TEXTS - 1)
    return ids[start : start + LONG]


def _loaded(out: Path) -> Any:
    from validate.runtime import MlxRuntime

    model = MlxRuntime.load(out, runtime="mlx_vlm")
    model.to_float32(dense=True)
    return getattr(model.model, "language_model", model.model)


def _spike(model: Any) -> None:
    """Two channels of one layer's key bias stand out, as in Qwen2 and 2.5 releases."""
    import mlx.core as mx

    projection = model.layers[1].self_attn.k_proj
    bias = np.zeros(projection.bias.shape, np.float32)
    bias[[7, 11]] = 0.78 * _SPIKE, -0.626 * _SPIKE
    projection.bias = mx.array(bias)


class _Bench:
    """One model and text, with what the float cache predicts."""

    def __init__(self, label: str, model: Any, ids: list[int]) -> None:
        from quant.kv.allocate import CHUNK
        from quant.kv.measure import baseline, forward_of
        from quant.kv.runtime import own_caches
        from quant.kv.scan import static_scan
        from quant.kv.study import Texts

        self.label, self.model, self.ids = label, model, ids
        self.facts = static_scan(model)
        self.forward = forward_of(model)
        self.texts = Texts.of(ids)
        start = self.texts.starts["long"]
        self.exact = baseline(
            self.forward, own_caches(model), ids, chunk=CHUNK, start=start, steps=_STEPS
        )

    @property
    def group(self) -> int:
        """Of the runtime's affine caches."""
        plain = all(fact.key_dim % 64 == 0 for fact in self.facts if fact.quantizable)
        return 64 if plain else 32

    def auto(self) -> tuple[Any, Any]:
        """What the study chooses at 3.5 bits, and what was seen of the model."""
        from quant.kv.allocate import allocate, allocated_spec, sensitivity

        facts, texts = self.facts, self.texts
        seen = texts.observed(self.model, facts, bits=3.5)
        measured = sensitivity(self.model, facts, texts.trial, seen=seen)
        return allocated_spec(facts, allocate(facts, measured, bits=3.5), seen), seen

    def against(self, spec: Any) -> Row:
        """The loss by position of ``spec`` less that of the runtime's own uniform 4 bits."""
        from quant.kv.measure import by_position
        from quant.kv.runtime import caches, dense_on_cpu, own_caches
        from quant.kv.study import Stock, stock_forward

        ours = by_position(self.forward, caches(self.model, spec), self.exact)
        setting = Stock(flags="", scheme="uniform", bits=4, group=self.group, effective_bits=0)
        try:
            with dense_on_cpu("mlx_vlm"):
                stepped = stock_forward(self.model, self.forward, setting)
                theirs = by_position(stepped, own_caches(self.model), self.exact)
        except NotImplementedError:  # of sliding windows: the same codec in the others
            theirs = by_position(self.forward, caches(self.model, self.uniform()), self.exact)
        row: Row = {"model": self.label}
        for part in ("prefill", "decode"):
            one, other = ours[part], theirs[part]
            gap = one - other
            row |= {
                part: float(one.mean()),
                f"{part}, uniform 4": float(other.mean()),
                f"{part}, ratio": float(one.mean() / other.mean()),
                f"{part}, difference": f"{gap.mean():.3g} ± {gap.std() / gap.size**0.5:.1g}",
            }
        return row

    def uniform(self) -> Any:
        """The runtime's uniform 4 bits in caches of ours.

        It attends to the first piece of a prompt as it came, and encodes it then.
        """
        from quant.kv.scan import spec_for
        from quant.kv.spec import TensorSpec

        affine = TensorSpec(scheme="uniform", bits=4, group=self.group)
        return spec_for(self.facts, lambda _: (affine, affine), **_alone())

    def row(self, setting: str, bits: float, found: Mapping[str, Any]) -> Row:
        """The table's row."""
        prefill, decode = found["prefill"], found["decode"]
        return {
            "model": self.label,
            "tokens": prefill.tokens,
            "setting": setting,
            "bits": bits,
            "prefill": prefill.kl_mean,
            "p99": prefill.kl_p99,
            "decode": decode.kl_mean,
            "same first choice": prefill.top1,
            "perplexity": f"x {prefill.ppl_ratio:.4f}",
        }

    def ours(self, setting: str, spec: Any) -> Iterator[Row]:
        """A setting of ours, its keys alone, and its values alone."""
        from quant.kv.allocate import halves
        from quant.kv.measure import loss
        from quant.kv.runtime import caches

        runs = {setting: spec}
        if "auto" in setting:
            runs |= {f"{setting}, {name}": one for name, one in halves(spec).items()}
        for name, one in runs.items():
            yield self.row(
                name, self.bits(one), loss(self.forward, caches(self.model, one), self.exact)
            )

    def bits(self, spec: Any) -> float:
        """Bits per number at the text's length, over layers that can be quantized."""
        from quant.kv.cache import BLOCK
        from quant.kv.spec import FLOAT, LayerSpec

        total = weight = 0.0
        for fact, layer in zip(self.facts, spec.layers, strict=True):
            if not fact.quantizable:
                continue
            layer = layer or LayerSpec(key=FLOAT, value=FLOAT)
            count = len(self.ids)
            coded = max(0, count - layer.sinks - layer.window) / count
            plain = 1 - coded + (BLOCK / count if layer.window and not layer.is_float else 0)
            for tensor, dim in ((layer.key, fact.key_dim), (layer.value, fact.value_dim)):
                stored = tensor.codec(dim, spec.rotation(dim)).effective_bits
                total += dim * (coded * stored + plain * 16)
                weight += dim
        return total / weight

    def stock(self, setting: Any) -> Row:
        """A setting of the runtime's own."""
        from quant.kv.measure import loss
        from quant.kv.runtime import dense_on_cpu, own_caches
        from quant.kv.study import stock_forward

        name = f"mlx-vlm {setting.scheme} {setting.bits:g}"
        try:
            with dense_on_cpu("mlx_vlm"):
                stepped = stock_forward(self.model, self.forward, setting)
                found = loss(stepped, own_caches(self.model), self.exact)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            said = str(error).splitlines()[0][:80]
            rest = dict.fromkeys(("p99", "decode", "same first choice", "perplexity"), "")
            return {
                "model": self.label,
                "tokens": len(self.ids),
                "setting": name,
                "bits": "",
                "prefill": f"refused: {said}",
                **rest,
            }
        return self.row(name, self._stock_bits(setting), found)

    def spared(self) -> int | None:
        """The layer that mlx-vlm's turboquant leaves in float: the last of three or more."""
        return len(self.facts) - 1 if len(self.facts) > 2 else None

    def _stock_bits(self, setting: Any) -> float:
        places = [fact for fact in self.facts if fact.quantizable]
        turbo = setting.scheme == "turboquant"
        stored = [
            16.0
            if turbo and fact.index == self.spared()
            else setting.bits + (16 / fact.key_dim if turbo else 32 / setting.group)
            for fact in places
        ]
        return sum(stored) / len(stored)


def _alone() -> dict[str, Any]:
    """Of a codec without anything beside it, as the runtime uses it."""
    from quant.kv.measure import LEAD

    return {"sinks": 0, "window": 0, "start": LEAD + 1, "subtract_mean": False}


def _model(label: str, model: Any, texts: list[list[int]]) -> Iterator[Row]:
    """Auto against uniform for each text; then all settings on the first."""
    from quant.kv.scan import LayerFacts, spec_for
    from quant.kv.spec import FLOAT, TensorSpec
    from quant.kv.study import Stock, chooser

    for number, ids in reversed(list(enumerate(texts))):
        bench = _Bench(label, model, ids)
        spec, seen = bench.auto()
        yield {"text": number % _TEXTS + 1, "tokens": len(ids), **bench.against(spec)}
    facts, group = bench.facts, bench.group
    yield from bench.ours("ours auto 3.5", spec)
    four, three = (chooser("turboquant", bits, group, seen) for bits in (4, 3))
    yield from bench.ours("ours turboquant 4", spec_for(facts, four, means=seen.means))

    def mixed(fact: LayerFacts) -> tuple[TensorSpec, TensorSpec]:
        return three(fact)[0], four(fact)[1]

    def but_spared(choose: Any) -> Any:
        return lambda fact: (FLOAT, FLOAT) if fact.index == bench.spared() else choose(fact)

    for name, bits, alone in (
        ("turboquant", 4.0, spec_for(facts, but_spared(four), **_alone())),
        ("turboquant", 3.5, spec_for(facts, but_spared(mixed), **_alone())),
        ("uniform", 4.0, bench.uniform()),
    ):
        yield from bench.ours(f"ours {name} {bits:g}, codec alone", alone)
        setting = Stock(flags="", scheme=name, bits=bits, group=group, effective_bits=0.0)
        yield bench.stock(setting)


def _rotated(trained: Path, place: Path, text: list[int]) -> Iterator[Row]:
    """The runtime's own scheme on values as they are and rotated, two of their channels massive."""
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console
    from quant.kv.study import Stock

    source = place / "massive"
    _massive(trained, source)
    for rotate in (False, True):
        out = place / f"massive-{rotate}"
        options = Options(dtype="float32", rotate_values=rotate)
        convert(Request(hf_path=str(source), mlx_path=out, recipes=(options,)), Console(quiet=True))
        label = "tinylm, massive values" + (", --kv-rotate-values" if rotate else "")
        bench = _Bench(label, _loaded(out), text)
        for bits in (4.0, 8.0):
            yield bench.stock(
                Stock(flags="", scheme="uniform", bits=bits, group=64, effective_bits=0.0)
            )


def _massive(trained: Path, source: Path) -> None:
    """The same function, but in two channels of every head values are sixteen times larger."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(trained, source)
    weights = {name: x.float() for name, x in load_file(source / "model.safetensors").items()}
    for name in list(weights):
        if name.endswith("v_proj.weight"):
            output = name.replace("v_proj", "o_proj")
            for channel in (5, 40):
                weights[name][channel::64] *= 16
                weights[output][:, channel::64] /= 16
    save_file(weights, source / "model.safetensors", {"format": "pt"})
