"""The C-RADIO tower under its releases' names: patches of pictures and of pairs of frames."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Concat, Constant
from arch_maps.rules import Kind, Mount

_MODELS: Final = {
    "vit_huge_patch16_224": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
    }
}
"""Sizes of the towers that a release names instead of stating them."""
_PLAIN: Final = ("vitdet_window_size", "feature_normalizer_config")
_SCALE: Final = "scales of one, which releases do not have and nothing is multiplied by"
_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_STD: Final = (0.26862954, 0.26130258, 0.27577711)
"""What the reference shifts and scales pixels by where a release does not say."""


def filled(facts: Facts) -> Facts:
    """The tower's facts as transformers' config names them, whichever spelling the release has.

    The releases' own code reads ``args``: the tower's name, its teachers, each of which has a
    token of its own, and the multiple up to which registers fill these up.
    """
    args = facts.data.get("args")
    data = {name: value for name, value in facts.data.items() if value is not None}
    named = "vit_huge_patch16_224"
    if isinstance(args, dict):
        named = args.get("model") or named
        own = Facts(args, path=f"{facts.path}args.", parent=facts)
        data.setdefault("max_img_size", args.get("cpe_max_size") or data.get("max_resolution"))
        teachers = args.get("teachers") or []
        names = {str(teacher.get("name")) for teacher in teachers if isinstance(teacher, dict)}
        tokens = len(names) if names and own.flag("cls_token_per_teacher", True) else 1
        data.setdefault("num_cls_tokens", tokens)
        if args.get("register_multiple"):
            multiple = int(own.size("register_multiple"))
            data.setdefault("num_registers", multiple - tokens % multiple)
        else:
            data.setdefault("num_registers", 0)
    if named not in _MODELS:
        facts.problem(
            f"config.json: {facts.path}args.model is {named!r}; the map knows the sizes of "
            f"{', '.join(_MODELS)} only"
        )
    sizes = dict(_MODELS["vit_huge_patch16_224"])
    if "hidden_size" in data and "intermediate_size" not in data:
        sizes["intermediate_size"] = int(data["hidden_size"] * data.get("mlp_ratio", 4.0))
    defaults = {**sizes, "patch_size": 16, "image_size": 224, "max_img_size": 2048}
    defaults |= {"num_cls_tokens": 3, "num_registers": 7, "video_temporal_patch_size": 2}
    return Facts({**defaults, **data}, path=facts.path, parent=facts)


def tower(at: Mount, given: Facts, *, released: bool) -> None:
    """Patches, tokens, positions and blocks, below ``at``.

    A ``released`` tower has what pixels are shifted and scaled by, which the runtime keeps though
    its processor does that. One that transformers saved has scales of each block's branches.
    """
    facts = filled(given)
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    patch = 3 * facts.size("patch_size") * facts.size("patch_size")
    conditioner = at / "input_conditioner"
    for name, values in (("norm_mean", _MEAN), ("norm_std", _STD)):
        if released:
            conditioner.tensor(name, 3, 1, 1, kind=Kind.STATE)
        else:
            each = tuple(Constant((1, 1, 1), value) for value in values)
            conditioner.rule(name, Concat(each, 0), Kind.STATE)
    model = at / "model"
    patches = model / "patch_generator"
    patches.linear("embedder", hidden, patch)
    patches.linear("video_embedder", hidden, facts.size("video_temporal_patch_size") * patch)
    side = facts.size("max_img_size") // facts.size("patch_size")
    patches.tensor("pos_embed", 1, side * side, hidden, kind=Kind.POSITION)
    tokens = facts.size("num_cls_tokens") + _registers(facts)
    patches.tensor("cls_token.token", tokens, hidden, kind=Kind.POSITION)
    for _, block in model.layers("blocks", facts.count("num_hidden_layers")):
        block.norm("norm1", hidden, bias=True)
        block.linear("attn.qkv", 3 * hidden, hidden, bias=True)
        block.linear("attn.proj", hidden, hidden, bias=True)
        block.norm("norm2", hidden, bias=True)
        block.linear("mlp.fc1", inner, hidden, bias=True)
        block.linear("mlp.fc2", hidden, inner, bias=True)
        for name in () if released else ("layer_scale1", "layer_scale2"):
            block.drop(f"{name}.lambda1", _SCALE, int(hidden), filled_with=1.0)


def _registers(facts: Facts) -> int:
    found = facts.data["num_registers"]
    return Dim(0, "num_registers") if found == 0 else facts.size("num_registers")


def spell_config(section: dict[str, Any], given: Facts) -> None:
    """Write the tower's facts as the runtime, transformers and the release's code read them."""
    facts = filled(given)
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes exact GELU")
    facts.expect("layer_norm_eps", 1e-6, default=1e-6, why="the runtime's blocks have no other")
    facts.expect("qkv_bias", True, default=True, why="the runtime's attention has biases")
    facts.expect("use_swiglu_ffn", False, default=False, why="the runtime has no gated MLP here")
    facts.expect("layerscale_value", 1.0, default=1.0, why="the runtime scales no branches")
    facts.expect("separate_video_embedder", True, default=True, why="the runtime has two of them")
    for name in _PLAIN:
        facts.expect(name, None, default=None, why="the runtime does without it")
    stated = facts.data.get("args") or {}
    tokens, registers = int(facts.size("num_cls_tokens")), int(_registers(facts))
    longest = int(facts.size("max_img_size"))
    named = {str(teacher["name"]) for teacher in stated.get("teachers") or []}
    args = {
        **stated,
        "cpe_max_size": longest,
        "cls_token_per_teacher": tokens > 1,
        # The runtime fills up to the next multiple, past one that is reached.
        "register_multiple": tokens + registers if registers else None,
    }
    if tokens > 1 and len(named) != tokens:
        args["teachers"] = [{"name": f"teacher {index}"} for index in range(tokens)]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    hidden, inner = int(facts.size("hidden_size")), int(facts.size("intermediate_size"))
    section.update(
        {name: int(facts.size(name)) for name in (*sizes, "patch_size", "image_size")},
        model_type="radio",
        args=args,
        mlp_ratio=inner / hidden,
        layer_norm_eps=1e-6,
        max_img_size=longest,
        max_resolution=longest,
        num_cls_tokens=tokens,
        num_registers=registers,
        video_temporal_patch_size=int(facts.size("video_temporal_patch_size")),
        separate_video_embedder=True,
    )
