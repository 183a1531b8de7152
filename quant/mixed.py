"""The named mixed recipes of mlx-lm and mlx-vlm: more bits where llama.cpp's Q4_K_M puts them."""

from collections.abc import Callable, Iterable
from typing import Final, Literal

from quant.recipe import Method, QuantSpec

Runtime = Literal["mlx-lm", "mlx-vlm"]

MIXED_RECIPES: Final[dict[str, tuple[int, int]]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_5": (3, 5),
    "mixed_3_6": (3, 6),
    "mixed_3_8": (3, 8),
    "mixed_4_6": (4, 6),
    "mixed_4_8": (4, 8),
}
"""Low and high bits by recipe name."""

MLX_LM_RECIPES: Final = frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"})
"""The recipes that stock mlx-lm has as well; mlx-vlm has all."""


def mixed_recipe(
    name: str,
    *,
    module_paths: Iterable[str],
    num_layers: int,
    mode: str = "affine",
    group_size: int = 64,
    method: Method = "rtn",
    runtime: Runtime = "mlx-vlm",
) -> Callable[[str], QuantSpec]:
    """The spec that ``runtime``'s predicate of that name gives each quantized module path.

    ``module_paths`` are the runtime's paths of the text model: the position of the layer index is
    read from its first down projection. The runtimes differ in which modules get the high bits:
    mlx-lm the head and v_proj, v_a_proj, v_b_proj and down_proj of some layers; mlx-vlm the head,
    the embedding and v_proj, down_proj and feed_forward.w2 of the same layers. ValueError for an
    unknown name, another mode than affine, or a model without down projections.
    """
    known = MIXED_RECIPES.keys() if runtime == "mlx-vlm" else MLX_LM_RECIPES
    if name not in known:
        raise ValueError(
            f"--quant-predicate {name} is not a recipe of {runtime}; "
            f"choose one of {', '.join(sorted(known))}"
        )
    if mode != "affine":
        raise ValueError(
            f"--quant-predicate {name} contradicts --q-mode {mode}: the recipes mix affine bits"
        )
    low_bits, high_bits = MIXED_RECIPES[name]
    low = QuantSpec.make("affine", low_bits, group_size, method)
    high = QuantSpec.make("affine", high_bits, group_size, method)
    down: tuple[str, ...]
    values: tuple[str, ...]
    ends: tuple[str, ...]
    if runtime == "mlx-vlm":
        down, values, ends = (
            ("down_proj", "feed_forward.w2"),
            ("v_proj",),
            ("lm_head", "embed_tokens"),
        )
    else:
        down, values, ends = ("down_proj",), ("v_proj", "v_a_proj", "v_b_proj"), ("lm_head",)
    position = _layer_position(name, module_paths, down)

    def spec_of(path: str) -> QuantSpec:
        parts = path.split(".")
        layer = 0
        if len(parts) > position and parts[position].isdigit():
            layer = int(parts[position])
        if _has(path, (*values, *down)) and _use_more_bits(layer, num_layers):
            return high
        return high if _has(path, ends) else low

    return spec_of


def _use_more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _layer_position(name: str, module_paths: Iterable[str], down: tuple[str, ...]) -> int:
    """Which dotted part of a path is the layer index; past the end where none is a number."""
    for path in module_paths:
        if _has(path, down):
            parts = path.split(".")
            return next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    raise ValueError(
        f"--quant-predicate {name} needs down projections ({' or '.join(down)}) and the model "
        "has none; choose --q-bits for all modules instead"
    )


def _has(path: str, names: tuple[str, ...]) -> bool:
    return any(name in path for name in names)
