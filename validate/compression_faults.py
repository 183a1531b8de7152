"""Taking faults of compressed attention out of a loaded model, in memory."""

from importlib import import_module
from typing import Any

Patch = tuple[Any, str, Any]


def overlapping_windows(model: Any) -> list[Patch]:
    """DeepSeek V4's windows overlap the one before, which mlx-vlm forgets from call to call."""
    del model
    mx: Any = import_module("mlx.core")
    module: Any = import_module("mlx_vlm.models.deepseek_v4.language")
    stock = module.Compressor.__call__

    def call(self: Any, x: Any, pool_cache: Any, offset: Any) -> Any:
        if pool_cache is None or not self.overlap:
            return stock(self, x, pool_cache, offset)
        kv, gate, start = pool_cache.accumulate_windows(self.wkv(x), self.wgate(x), offset)
        if kv.size == 0:
            return pool_cache.update_and_fetch(mx.zeros((x.shape[0], 0, self.head_dim), x.dtype))
        windows = [mx.unflatten(part, 1, (-1, self.compress_ratio)) for part in (kv, gate)]
        before = getattr(pool_cache, "window_before", None)
        pool_cache.window_before = [part[:, -1:] for part in windows]
        if before is not None:
            pairs = zip(before, windows, strict=True)
            windows = [mx.concatenate(pair, axis=1) for pair in pairs]
        pooled = module._overlap_compress_kv(*windows, self.ape, self.head_dim)
        pooled = self.norm(pooled[:, 1:] if before is not None else pooled)
        return pool_cache.update_and_fetch(self.rope(pooled[:, None], offset=start).squeeze(1))

    return [(module.Compressor, "__call__", call)]


def blocks_by_head(model: Any) -> list[Patch]:
    """MiniMax M3's choice of blocks for each group of heads, where mlx-vlm makes one for all."""
    return [
        (layer, "self_attn", _choosing(layer.self_attn))
        for layer in model.language_model.model.layers
        if layer.self_attn.has_sparse_index
    ]


def _choosing(at: Any) -> Any:
    mx: Any = import_module("mlx.core")

    def heads(x: Any, count: int, norm: Any = None) -> Any:
        x = x.reshape(*x.shape[:2], count, -1)
        return (norm(x) if norm else x).transpose(0, 2, 1, 3)

    def call(x: Any, mask: Any = None, cache: Any = None, position_ids: Any = None) -> Any:
        del mask, position_ids
        known = getattr(cache, "by_head", None)
        start = known[0].shape[2] if known else 0
        query = at.rope(heads(at.q_proj(x), at.num_attention_heads, at.q_norm), offset=start)
        chooser = at.rope(heads(at.index_q_proj(x), at.index_heads, at.index_q_norm), offset=start)
        new = [
            at.rope(heads(at.k_proj(x), at.num_key_value_heads, at.k_norm), offset=start),
            heads(at.v_proj(x), at.num_key_value_heads),
            at.rope(heads(at.index_k_proj(x), 1, at.index_k_norm), offset=start),
        ]
        if known:
            new = [mx.concatenate(pair, axis=2) for pair in zip(known, new, strict=True)]
        if cache is not None:
            cache.by_head = new
        keys, values, index = new
        length, size = keys.shape[2], at.sparse_block_size
        here = mx.arange(start, length)[:, None]
        seen = mx.arange(length)[None] <= here
        scores = mx.where(seen, chooser @ index.swapaxes(-1, -2), -mx.inf)
        count = -(-length // size)
        pad = [(0, 0)] * 3 + [(0, count * size - length)]
        scores = mx.pad(scores, pad, constant_values=-mx.inf)
        scores = scores.reshape(*scores.shape[:3], count, size).max(axis=-1)
        block, own = mx.arange(count)[None], here // size
        near = (block <= own) & (block > own - at.sparse_local_blocks)
        scores = mx.where(near, mx.inf, scores)
        if count > at.sparse_topk_blocks:
            kept = mx.argsort(mx.argsort(-scores, axis=-1), axis=-1) < at.sparse_topk_blocks
        else:
            kept = mx.ones(scores.shape, dtype=mx.bool_)
        kept = mx.repeat(kept, size, axis=-1)[..., :length] & seen
        kept = mx.repeat(kept, at.num_attention_heads // at.index_heads, axis=1)
        out = mx.fast.scaled_dot_product_attention(query, keys, values, scale=at.scale, mask=kept)
        return at.o_proj(out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

    call.__dict__["has_sparse_index"] = True  # the stack asks its layers
    return call
