"""GLM 5.3: delta attention and chosen tokens over streams of the residual, and GLM-OCR's tower."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, dsa, hyper, kda, llama, mla, moe
from arch_maps.vision import glm_vit

_DELTA: Final = "linear_attention"
_CHOSEN: Final = "deepseek_sparse_attention"
_SPELLINGS: Final = {"full_attention": _CHOSEN, "indexed_attention": _CHOSEN}
"""Other names of a layer that attends to chosen tokens."""
_DEFAULTS: Final = {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8}
_LINEAR: Final = {
    "linear_num_heads": ("num_heads", 64),
    "linear_head_dim": ("head_dim", 128),
    "linear_conv_kernel_dim": ("short_conv_kernel_size", 4),
}
"""Sizes of delta attention: transformers 5's name, the release's, and the reference's default."""
_TOWER: Final = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
_TOKENS: Final = {
    **{"image": 154854, "video": 154855, "image_start": 154830, "image_end": 154831},
    **{"video_start": 154832, "video_end": 154833},
}


def _text(facts: Facts) -> Facts:
    """The text's facts, with those of delta attention under transformers 5's names."""
    stated = facts.section("text_config")
    text = stated.filled(_DEFAULTS)
    listed = text.data.get("linear_attn_config") or {}
    found = {
        name: listed.get(theirs, text.data.get(name, default))
        for name, (theirs, default) in _LINEAR.items()
    }
    # None says that there is no bound, which is not the same as saying nothing.
    bound = stated.data.get("linear_lower_bound", -5.0)
    return text.overruled({**found, "linear_lower_bound": bound})


def _lower_bound(text: Facts) -> float | None:
    """The bound of the decay; None where it has none."""
    listed = text.data.get("linear_attn_config") or {}
    bound = listed.get("gate_lower_bound", text.data.get("linear_lower_bound", -5.0))
    if bound is None and listed and listed.get("safe_gate", True):
        return -5.0
    return None if bound is None else float(bound)


def _kinds(text: Facts) -> list[str]:
    """The kind of attention of each layer; every fourth chooses tokens unless a list says so."""
    layers = text.count("num_hidden_layers")
    listed = text.data.get("layer_types")
    if listed is None:
        return [_CHOSEN if index % 4 == 3 else _DELTA for index in range(layers)]
    kinds = [_SPELLINGS.get(kind, kind) for kind in listed]
    if len(kinds) != layers or set(kinds) - {_DELTA, _CHOSEN}:
        text.problem(
            f"config.json: {text.path}layer_types must list {layers} layers as {_DELTA} or "
            f"{_CHOSEN}"
        )
        return [_CHOSEN] * layers
    return kinds


def _sparse(text: Facts) -> list[bool]:
    """Which layers have experts; all but the first three unless a list says so."""
    layers = text.count("num_hidden_layers")
    listed = text.data.get("mlp_layer_types")
    if listed is None:
        dense = deepseek.dense_first(text, 3)
        return [index >= dense for index in range(layers)]
    if len(listed) != layers or set(listed) - {"dense", "sparse"}:
        text.problem(
            f"config.json: {text.path}mlp_layer_types must list {layers} layers as dense or sparse"
        )
        return [True] * layers
    return [kind == "sparse" for kind in listed]


def _choosers(text: Facts, kinds: list[str]) -> list[str]:
    """Which layers choose tokens; of those that attend to chosen ones the first must."""
    found = dsa.choosers(text, leading=False)
    first = next((i for i, kind in enumerate(kinds) if kind == _CHOSEN), None)
    if first is not None and found[first] != "full":
        text.problem(
            f"config.json: {text.path}indexer_types must have full in layer {first}, the first to "
            "attend to chosen tokens"
        )
    return found


def _latent(text: Facts) -> mla.Sizes:
    text.expect("qk_rope_head_dim", 0, default=0, why="the reference has no positions")
    return mla.sizes(text, rotated=False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = _text(facts)
    vocab, hidden = text.size("vocab_size"), text.size("hidden_size")
    latent, e = _latent(text), deepseek.routed(text, fused=False)
    kinds, sparse = _kinds(text), _sparse(text)
    choosers = _choosers(text, kinds)
    state = kda.Sizes(
        hidden=hidden,
        heads=text.size("linear_num_heads"),
        head_dim=text.size("linear_head_dim"),
        kernel=text.size("linear_conv_kernel_dim"),
    )

    def chosen(layer: Mount, *, chooses: bool) -> None:
        mla.joined_attention(layer / "self_attn", latent)
        if chooses:
            dsa.pooled_indexer(layer, text)

    def feed_forward(layer: Mount, *, routed: bool) -> None:
        if routed:
            deepseek.experts(layer / "mlp", text, e, shared_mlp=llama.joined_mlp)
        else:
            llama.joined_mlp(layer / "mlp", hidden, text.size("intermediate_size"))
        layer.norm("input_layernorm", hidden)
        layer.norm("post_attention_layernorm", hidden)

    stack = root.at(source=layout["text"], target="language_model.model")
    stack.embedding("embed_tokens", vocab, hidden)
    for index, layer in stack.layers("layers", len(kinds)):
        if kinds[index] == _DELTA:
            kda.joined_attention(layer / "self_attn", state)
        else:
            chosen(layer, chooses=choosers[index] == "full")
        feed_forward(layer, routed=sparse[index])
        hyper.connections(layer, text)
    stack.norm("norm", hidden)
    moe.untied(facts)
    moe.untied(text)
    root.at(source="", target="language_model").head("lm_head", vocab, hidden, tied_to=None)

    def further(layer: Mount) -> None:
        """A layer that predicts a further token, which has no streams."""
        chosen(layer, chooses=True)
        feed_forward(layer, routed=True)

    deepseek.drop_mtp(root, text, len(kinds), further, stack=layout["text"])
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    glm_vit.tower(tower, _vision(facts))


def _vision(facts: Facts) -> Facts:
    return facts.section("vision_config").filled({"projection_intermediate_size": 10240})


def _spell_text(config: dict[str, Any], text: Facts) -> None:
    """Write the text's facts under every name that the runtime looks for, in place."""
    llama.expect_silu(text)
    text.expect("mla_use_nope", True, None, default=True, why="the reference has no positions")
    why = "the reference averages the keys of a pool by a gate"
    text.expect("index_kpool_compress", True, None, default=True, why=why)
    latent, kinds, sparse = _latent(text), _kinds(text), _sparse(text)
    heads = int(latent.heads)
    if text.data.get("num_key_value_heads", heads) != heads:
        text.problem(
            f"config.json: {text.path}num_key_value_heads must be num_attention_heads ({heads})"
        )
    topk, pool = int(text.size("index_topk", 2048)), int(text.size("index_kpool", 16))
    if topk % pool:
        text.problem(
            f"config.json: {text.path}index_topk ({topk}) must be a multiple of index_kpool "
            f"({pool})"
        )
    deepseek.spell_routing(config, text, dense=sparse.index(True) if any(sparse) else len(sparse))
    deepseek.sigmoid_routing(config, text)
    dsa.spell_config(config, text, interleaved=True)
    hyper.spell_config(config, text)
    mla.spell_config(config, latent)
    bound = _lower_bound(text)
    linear = {theirs: int(text.size(name)) for name, (theirs, _) in _LINEAR.items()}
    config.update(
        {name: int(text.size(name)) for name in _LINEAR},
        model_type="glm5_next_text",
        num_key_value_heads=heads,
        head_dim=0,
        qk_head_dim=int(latent.nope),
        layer_types=kinds,
        mlp_layer_types=["sparse" if routed else "dense" for routed in sparse],
        indexer_types=_choosers(text, kinds),
        index_topk_pattern=None,
        index_kpool=pool,
        index_kpool_compress=True,
        index_kpool_always_select_tail=text.flag("index_kpool_always_select_tail", True),
        mla_use_nope=True,
        swiglu_limit=text.number("swiglu_limit", 10.0),
        linear_lower_bound=bound,
        linear_attn_config={
            **(config.get("linear_attn_config") or {}),
            **linear,
            "gate_lower_bound": bound,
            "safe_gate": bound is not None,
        },
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(text.size("max_position_embeddings", 1048576)),
        tie_word_embeddings=False,
    )


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, tower = _text(facts), _vision(facts)
    _spell_text(out["text_config"], text)
    section = out["vision_config"]
    glm_vit.spell_config(section, tower, model_type="glm5_next_vision")
    rope = spell.rope(tower)
    if rope["rope_theta"] != 10000.0:
        tower.problem(f"config.json: {tower.path}rope_theta must be 10000; the runtime takes it")
    section.update(
        {name: int(tower.size(name)) for name in _TOWER},
        swiglu_limit=tower.number("swiglu_limit", 10.0),
        projection_intermediate_size=int(tower.size("projection_intermediate_size")),
    )
    for name, default in _TOKENS.items():
        out.setdefault(f"{name}_token_id", default)
    vocab, hidden = int(text.size("vocab_size")), int(text.size("hidden_size"))
    out.update(tie_word_embeddings=False, vocab_size=vocab, hidden_size=hidden)
    return out


MAP = ArchMap(
    model_type="glm5_next",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {"text": "model.language_model", "vision": "model.visual"}),),
    runtimes=("mlx-vlm",),
    parts=(
        *("text.kda", "text.mla", "text.dsa", "text.moe", "text.deepseek", "text.hyper"),
        "vision.glm_vit",
    ),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
