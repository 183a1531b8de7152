"""LoRA: a few steps of fine-tuning by the stock trainers, and the adapter loaded again."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from validate.acceptance.bench import QUESTION, Bench, reply_of
from validate.acceptance.model import Found, Row, RowFailure
from validate.acceptance.process import arguments
from validate.acceptance.rows.generate import printed, require_printed

_ANSWER: Final = "The boat came in late, because the wind was against it."
_STEPS: Final = 8
_RATE: Final = "5e-4"
_ROWS: Final = 4
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_LOSS: Final = {
    "mlx_vlm": re.compile(r"train_loss=([\d.]+|nan|inf)"),
    # A line of the training table: step, loss, tokens per second, tokens.
    "mlx_lm": re.compile(r"^\s*\d+\s+([\d.]+|nan|inf)\s+\S*\s+\S+\s+\S+k\s*$", re.M),
}


def train(bench: Bench, runtime: str) -> tuple[Path, list[float]]:
    """Folder of an adapter that a stock trainer made, and the loss of each step."""
    return bench.once(f"adapter of {runtime}", lambda: _train(bench, runtime))


def _train(bench: Bench, runtime: str) -> tuple[Path, list[float]]:
    data = bench.work / f"data-{runtime}"
    adapter = bench.work / f"adapter-{runtime}"
    data.mkdir()
    row = json.dumps(_example(bench, runtime)) + "\n"
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(row * _ROWS, encoding="utf-8")
    common: dict[str, str | Path | int | float] = {
        "data": data,
        "iters": _STEPS,
        "learning_rate": _RATE,
        "steps_per_report": 1,
    }
    if runtime == "mlx_vlm":
        words = arguments(model=bench.facts.folder, **common, steps_per_eval="none")
        out = bench.run("mlx_vlm.train", *words, *arguments(output_path=adapter))
    else:
        words = arguments("lora", "--train", model=bench.facts.folder, **common, batch_size=1)
        few = arguments(num_layers=-1, val_batches=1, steps_per_eval=1000, adapter_path=adapter)
        out = bench.run("mlx_lm", *words, *few)
    losses = [float(text) for text in _LOSS[runtime].findall(_COLOURS.sub("", out))]
    if len(losses) < 2:
        raise RowFailure(f"the trainer reports no losses: {out[-300:]!r}")
    return adapter, losses


def _example(bench: Bench, runtime: str) -> dict[str, object]:
    """One row of training data, as text where there is no template to write a conversation by."""
    if runtime == "mlx_lm" and not bench.facts.template:
        return {"text": f"{QUESTION} {_ANSWER}"}
    turns = (("user", QUESTION), ("assistant", _ANSWER))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _tune(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        _, losses = train(bench, runtime)
        told = f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps"
        if not losses[-1] < losses[0]:
            raise RowFailure(f"{told}: it does not fall")
        return Found(note=told, metrics={"first loss": losses[0], "last loss": losses[-1]})

    return run


def _load(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        adapter, _ = train(bench, runtime)
        with_it = bench.session(runtime, adapter=adapter)["replies"]["text"]
        if "error" in with_it:
            raise RowFailure(str(with_it["error"]))
        plain = reply_of(bench.python(runtime, "text"))
        if reply_of(with_it).steps[:1] == plain.steps[:1]:
            raise RowFailure("the adapter changes no log-probability")
        require_printed(with_it["text"], printed(bench, runtime, *arguments(adapter_path=adapter)))
        return Found(note=f"other log-probabilities than without it; it says {with_it['text']!r}")

    return run


ROWS: Final = tuple(
    row
    for runtime in ("mlx_vlm", "mlx_lm")
    for row in (
        Row(
            name="LoRA fine-tuning",
            runtime=runtime,
            rule=f"the loss falls within {_STEPS} steps of the stock trainer on one example",
            run=_tune(runtime),
        ),
        Row(
            name="adapter loading",
            runtime=runtime,
            rule="the adapter of the fine-tuning loads again, changes the log-probabilities, and "
            "generate --adapter-path prints the Python call's greedy text with it",
            run=_load(runtime),
        ),
    )
)
