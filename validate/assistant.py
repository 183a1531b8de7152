"""Drafters that read the keys and values of the model they help, held against torch by themselves.

Such a drafter has no prompt of its own, so both sides are fed the same drawn states. Whether it
drafts rightly beside its model is another question, which running both answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from validate.gates import logits_check
from validate.judgement import Found, Judgement, load_checked
from validate.reference import TorchReference
from validate.runtime import RuntimeRefusal

Floats = NDArray[np.float32]
FULL, SLIDING = "full_attention", "sliding_attention"
LENGTHS: Final = (5, 13, 40)
"""Tokens that the model has seen; beyond its window, sliding layers keep the window's."""


@dataclass(frozen=True)
class States:
    """What a drafter is given for its first token."""

    name: str
    length: int
    embeds: Floats
    """[1, 1, 2 * width of the model]: its last token's embedding and its last hidden state."""
    shared: Mapping[str, tuple[Floats, Floats]]
    """Keys and values by kind of attention, [1, heads, tokens, head size]."""


def assists(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is such a drafter."""
    return "backbone_hidden_size" in config


def judge_assistant(
    job: Judgement, config: Mapping[str, Any], *, source: Path, dequantized: Path | None
) -> tuple[dict[str, Any], Found]:
    """Description of the reference, and every check of a drafter in mlx-vlm."""
    drawn = [_draw(config, length) for length in LENGTHS]
    job.progress("torch: loading the reference")
    model = TorchReference.load(dequantized or source, trust_remote_code=job.trust_remote_code)
    if dequantized is None and not model.holds_in(job.dtype):
        model.round_to(job.dtype)
    wanted = [_torch(model.model, states) for states in drawn]
    described: dict[str, Any] = model.describe()
    model.close()
    found = Found("mlx_vlm", description={"name": "mlx_vlm"})
    try:
        runtime = load_checked(job, found, sample=False)
        given = [_mlx(runtime.model, states) for states in drawn]
    except RuntimeRefusal as error:
        found.refused("load", "weights", error)
        return described, found
    for at, name in enumerate(("logits", "hidden state")):
        pairs = [(s.name, a[at], b[at]) for s, a, b in zip(drawn, wanted, given, strict=True)]
        found.checks.append(logits_check(name, modality="text", runtime="mlx_vlm", pairs=pairs))
    return described, found


def _draw(config: Mapping[str, Any], length: int) -> States:
    """Normal states of the sizes that the converted config states."""
    text = config["text_config"]
    rng = np.random.default_rng(length)
    width = 2 * int(config["backbone_hidden_size"])
    own = text.get("num_global_key_value_heads")
    heads = {SLIDING: int(text["num_key_value_heads"])}
    heads[FULL] = int(own) if own and text.get("attention_k_eq_v") else heads[SLIDING]
    sizes = {SLIDING: int(text["head_dim"]), FULL: int(text["global_head_dim"])}
    kept = {SLIDING: min(length, int(text["sliding_window"]) - 1), FULL: length}

    def states(kind: str) -> Floats:
        return rng.standard_normal((1, heads[kind], kept[kind], sizes[kind])).astype(np.float32)

    embeds = rng.standard_normal((1, 1, width)).astype(np.float32)
    shared = {kind: (states(kind), states(kind)) for kind in (FULL, SLIDING)}
    return States(f"{length} tokens", length, embeds, shared)


def _torch(model: Any, states: States) -> tuple[Floats, Floats]:
    import torch

    shared = {
        kind: (torch.from_numpy(keys), torch.from_numpy(values))
        for kind, (keys, values) in states.shared.items()
    }
    with torch.inference_mode():
        output = model(
            inputs_embeds=torch.from_numpy(states.embeds),
            shared_kv_states=shared,
            position_ids=torch.tensor([[states.length - 1]]),
        )
    return output.logits[0].numpy(), output.last_hidden_state[0].numpy()


def _mlx(model: Any, states: States) -> tuple[Floats, Floats]:
    import mlx.core as mx

    model.bind(SimpleNamespace())
    shared = {
        kind: (mx.array(keys), mx.array(values)) for kind, (keys, values) in states.shared.items()
    }
    model.set_shared_kv(shared, states.length, position=states.length - 1)
    position = mx.array([[states.length - 1]])
    hidden, logits = model(mx.array(states.embeds), shared, position)
    return np.array(logits[0]), np.array(hidden[0])
