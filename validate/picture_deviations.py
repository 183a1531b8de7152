"""Documented faults of mlx-vlm that only pictures and videos show."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

from validate import (
    anyres_faults,
    ernie_faults,
    glm4v_faults,
    idefics2_faults,
    image_faults,
    llama4_faults,
    mllama_faults,
    molmo_faults,
    moonvit_faults,
    phi4mm_faults,
    video_faults,
)
from validate.fault import Deviation, Patch
from validate.fault import picture_fault as _picture


def _prepared(model_types: tuple[str, ...], *, what: str, bound: float) -> Deviation:
    """Pictures that mlx-vlm's processor prepares otherwise than the release's."""
    return Deviation(
        name="preparation",
        runtime="mlx_vlm",
        model_types=model_types,
        modality="image",
        what=what,
        bound=bound,
        patches=lambda model: [],
        prepares=True,
    )


def _exact_merger_gelu(model: Any) -> list[Patch]:
    nn: Any = import_module("mlx.nn")
    return [(block, "act", nn.GELU()) for block in model.merger.mlp]


def _by_grids(model_type: str, setting: str, patches: Callable[..., Sequence[Patch]]) -> Deviation:
    """The positions of a video, which the release counts by seconds as ``setting`` has it."""
    return Deviation(
        name="time",
        runtime="mlx_vlm",
        model_types=(model_type,),
        modality="video",
        what="mlx-vlm 0.7.10 counts the positions of a video by its grids, where the release "
        f"counts them by seconds ({setting})",
        bound=1.5,
        patches=patches,
        configured=True,
    )


PICTURES: Final = (
    _by_grids("qwen2_5_vl", "tokens_per_second", video_faults.qwen2_5_vl),
    _by_grids("qwen3_omni_moe", "position_id_per_seconds", video_faults.qwen3_omni),
    Deviation(
        name="merger activation",
        runtime="mlx_vlm",
        model_types=("minicpmv4_6", "minicpmv4_7"),
        modality="image",
        what="mlx-vlm 0.7.10 computes the merger's GELU by its tanh approximation "
        "(MLX's 'precise'), where the release uses the error function",
        bound=1e-2,
        patches=_exact_merger_gelu,
    ),
    _picture(
        "pictures",
        "gemma3",
        what="mlx-vlm 0.7.10 lets the tokens of a picture attend backwards only, where the release "
        "lets them see the whole picture; rounds the scale of the embeddings to bfloat16; and "
        "has an epsilon of its own in the tower's last norm",
        bound=2.0,
        patches=image_faults.gemma3,
    ),
    _picture(
        "swapped activations",
        "qwen3_vl_moe",
        what="mlx-vlm 0.7.10 computes exact GELU in the tower's blocks, where the release means "
        "its tanh form, and the tanh form in the mergers, where it means exact GELU",
        bound=1.0,
        patches=image_faults.swapped_gelu,
    ),
    _picture(
        "activation",
        "qwen3_omni_moe",
        what="mlx-vlm 0.7.10 computes exact GELU in the tower's blocks, where the release means "
        "its tanh form",
        bound=1e-3,
        patches=image_faults.tanh_blocks,
    ),
    _picture(
        "activation",
        "internvl",
        what="mlx-vlm 0.7.10 computes the tanh form of GELU in the tower and the projector, where "
        "the release means exact GELU",
        bound=1e-1,
        patches=image_faults.internvl,
    ),
    _picture(
        "positions",
        "muse_glimmer",
        what="mlx-vlm 0.7.10 resamples the tower's table of positions by rows, where the release "
        "walks it by columns, so that the patches of a picture that is not square get others "
        "(transformers before 5.24 has the same fault)",
        bound=3.0,
        patches=image_faults.muse_glimmer,
    ),
    _picture(
        "positions",
        "idefics3",
        "smolvlm",
        what="mlx-vlm 0.7.10 rounds the position of a patch within its picture otherwise than the "
        "release, so that some patches take a neighbour's position, and has an epsilon of its "
        "own in the tower's last norm",
        bound=1.0,
        patches=image_faults.idefics3,
    ),
    _picture(
        "activation and norms",
        "granite4_vision",
        what="mlx-vlm 0.7.10 computes x*sigmoid(1.7x) in the tower, where the release means the "
        "tanh form of GELU, and gives the projectors' norms an epsilon of 1e-5 for 1e-12",
        bound=6e-3,
        patches=anyres_faults.granite4,
    ),
    _picture(
        "pictures",
        "molmo2",
        what="mlx-vlm 0.7.10 lets the tokens of a picture attend backwards only, where the release "
        "lets them see the whole picture, and computes x*sigmoid(1.7x) in the tower, where it "
        "means the tanh form of GELU",
        bound=1.0,
        patches=molmo_faults.molmo2,
    ),
    _picture(
        "tiles and activation",
        "granite_vision",
        what="mlx-vlm 0.7.10 puts whole tiles where single picture tokens belong, without the "
        "release's order and line ends, and computes x*sigmoid(1.7x) in the tower, where it means "
        "the tanh form of GELU",
        bound=0.2,
        patches=anyres_faults.packed_tiles,
    ),
    _picture(
        "tiles",
        "llava_next",
        what="mlx-vlm 0.7.10 puts whole tiles where single picture tokens belong, without the "
        "release's order and line ends",
        bound=3.0,
        patches=anyres_faults.packed_tiles,
    ),
    _picture(
        "positions, padding and activation",
        "idefics2",
        what="mlx-vlm 0.7.10 places every patch one bucket off, lets padding take part in "
        "attention, computes x*sigmoid(1.7x) in the tower, where the release means the tanh form "
        "of GELU, and has epsilons of its own in the last norm and in the resampler",
        bound=1.0,
        patches=idefics2_faults.idefics2,
    ),
    _picture(
        "last norm",
        "cohere2_vision",
        what="mlx-vlm 0.7.10 projects the tower's last layer without the norm that the release "
        "puts behind it",
        bound=3.0,
        patches=image_faults.cohere2_vision,
    ),
    _picture(
        "positions and norms",
        "glm4v",
        "glm4v_moe",
        what="mlx-vlm 0.7.10 resamples the tower's table of positions linearly, with nothing "
        "beyond its edge, where the release does it by cubics with the edge repeated, and gives "
        "the blocks' norms an epsilon of 1e-6",
        bound=1.0,
        patches=glm4v_faults.glm4v,
    ),
    _picture(
        "experts",
        "ernie4_5_moe_vl",
        what="mlx-vlm 0.7.10 never tells its generation which tokens are a picture's, and gives "
        "these to the experts for text, where the release has experts for them and for the marks "
        "at their ends",
        bound=2.0,
        patches=ernie_faults.pictures_experts,
    ),
    _picture(
        "padded tiles",
        "mllama",
        what="mlx-vlm 0.7.10 lets the tokens after a prompt attend to tiles that are padding",
        bound=5e-2,
        patches=mllama_faults.crossing,
    ),
    _picture(
        "activation",
        "llama4",
        what="mlx-vlm 0.7.10 computes x*sigmoid(1.7x) in the tower and its adapter, where the "
        "release means exact GELU, and norms queries and keys with an epsilon of its own",
        bound=1.0,
        patches=llama4_faults.pictures,
    ),
    _picture(
        "positions, activation and norms",
        "kimi_k25",
        what="mlx-vlm 0.7.10 resamples the tower's positions with another cubic than torch, "
        "computes exact GELU in the tower for its tanh form, and gives its norms an epsilon of "
        "1e-6 for 1e-5",
        bound=1.0,
        patches=moonvit_faults.moonvit,
    ),
    Deviation(
        name="pictures",
        runtime="mlx_vlm",
        model_types=("phi4mm",),
        modality="image",
        what="mlx-vlm 0.7.10 gives the text every patch of a picture at its own size, where the "
        "release cuts it into tiles, averages two by two patches and marks line ends",
        bound=3.0,
        patches=phi4mm_faults.tiles,
        released=True,
        prepares=True,
        foreign=True,
    ),
    *(
        _prepared(types, what=what, bound=bound)
        for types, what, bound in (
            (
                ("muse_glimmer",),
                "mlx-vlm 0.7.10 resizes pictures by Pillow's Lanczos, which differs from "
                "torchvision's by 26 grey levels at most where it was measured",
                1.0,
            ),
            (
                ("gemma4_unified",),
                "mlx-vlm 0.7.10 resizes pictures by Pillow, whose grey levels are one off "
                "torchvision's here and there",
                0.1,
            ),
            (
                ("molmo2",),
                "mlx-vlm 0.7.10 leaves out the begin-of-text token before a picture, and smooths "
                "what it makes smaller, where the release does not",
                1.0,
            ),
            (
                ("llama4",),
                "mlx-vlm 0.7.10 stretches pictures where the release pads them, and leaves out the "
                "small whole picture beside the tiles",
                2.0,
            ),
            (
                ("lfm2_vl", "lfm2-vl"),
                "mlx-vlm 0.7.10 cuts large pictures into 2 to 10 tiles, whatever the release's "
                "processor says",
                2.0,
            ),
        )
    ),
)
