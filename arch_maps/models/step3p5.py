"""Step 3.5 Flash: the Step text stack alone."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import step


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = step.sizes(facts)
    step.stack(root / "model", s)
    step.drop_mtp(root, facts, s, text="model")
    root.head("lm_head", s.vocab, s.hidden, tied_to=None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = step.spell_config(Facts(spell.start(config), parent=facts), step.sizes(facts))
    # mlx-lm reads the layers with experts from text only.
    listed = ",".join(str(index) for index in out["moe_layers_enum"])
    return out | {"moe_layers_enum": listed, "num_nextn_predict_layers": 0}


MAP = ArchMap(
    model_type="step3p5",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.step",),
)
