"""Quantized releases: literal layouts, drops with reasons, contradictions found before reading."""

import json

import numpy as np
import pytest
import torch
from quantized_helpers import LINEAR, release, rows_of, stored_of, view_of

from converter.decode import BadCodesError
from converter.errors import PlanError

WEIGHT = f"{LINEAR}.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [2, 32]}
ONE = 0x38
"""1.0 in E4M3."""


def named(**tensors):
    return {f"{LINEAR}.{name.replace('__', '.')}": value for name, value in tensors.items()}


def e4m3(*shape, code=ONE):
    return torch.full(shape, code, dtype=torch.uint8).view(torch.float8_e4m3fn)


def problems(folder, tensors, settings, shape=(8, 8), **config):
    release(folder, tensors, settings, **config)
    with pytest.raises(PlanError) as caught:
        view_of(folder, shape)
    return list(caught.value.problems)


def test_fp8_blocks_that_end_in_the_middle(tmp_path):
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    tensors = named(weight=e4m3(3, 40), weight_scale_inv=scales)
    view = view_of(release(tmp_path, tensors, FP8))
    expected = np.repeat(np.repeat(scales.numpy(), 2, 0), 32, 1)[:3, :40]
    np.testing.assert_array_equal(rows_of(tmp_path, view), expected)
    np.testing.assert_array_equal(rows_of(tmp_path, view, step=1), expected)
    assert view.coded[WEIGHT].native is None


@pytest.mark.parametrize("stored", ["bytes", "floats"])
def test_fp8_with_powers_of_two_becomes_mxfp8(stored, tmp_path):
    exponents = torch.tensor([[127, 128], [129, 120]], dtype=torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu)
    if stored == "floats":
        scales = 2.0 ** (exponents.float() - 127)
    codes = torch.arange(4 * 64, dtype=torch.uint8).reshape(4, 64) % 0x7F
    tensors = named(weight=codes.view(torch.float8_e4m3fn), weight_scale_inv=scales)
    view = view_of(release(tmp_path, tensors, {**FP8, "scale_fmt": "ue8m0"}))
    parts = stored_of(tmp_path, view, "BF16", step=1)
    assert parts["weight"].view(np.uint8).tolist() == codes.tolist()
    assert parts["scales"].tolist() == [[127, 128], [127, 128], [129, 120], [129, 120]]
    plain = codes.view(torch.float8_e4m3fn).float().numpy()
    wide = np.repeat(np.repeat(2.0 ** (exponents.numpy() - 127.0), 2, 0), 32, 1)
    np.testing.assert_array_equal(rows_of(tmp_path, view), (plain * wide).astype(np.float32))


def test_fp8_per_tensor_with_activation_scales(tmp_path):
    """As Ministral and ModelOpt have it: one scale, and one for the activations."""
    tensors = named(
        weight=e4m3(2, 32),
        weight_scale_inv=torch.tensor(0.5, dtype=torch.bfloat16),
        activation_scale=torch.tensor(3.0),
        k_scale=torch.tensor(1.0),
    )
    view = view_of(release(tmp_path, tensors, {"quant_method": "fp8"}))
    np.testing.assert_array_equal(rows_of(tmp_path, view), np.full((2, 32), 0.5))
    reasons = {drop.name: drop.reason for drop in view.drops}
    assert set(reasons) == {f"{LINEAR}.activation_scale", f"{LINEAR}.k_scale"}
    assert "activations" in reasons[f"{LINEAR}.activation_scale"]
    assert "KV cache" in reasons[f"{LINEAR}.k_scale"]


def test_stacked_experts_in_fp8(tmp_path):
    scales = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    tensors = {"experts.up": e4m3(2, 4, 32), "experts.up_scale_inv": scales}
    view = view_of(release(tmp_path, tensors, FP8))
    rows = rows_of(tmp_path, view, "experts.up", step=1)
    np.testing.assert_array_equal(rows[:, :, 0], [[1, 1, 2, 2], [3, 3, 4, 4]])


@pytest.mark.parametrize("method", ["fp8", "modelopt"])
def test_a_table_in_parts_has_one_scale(method, tmp_path):
    """As Qwen3.8-Flash-Next's n-grams, which releases list among what they leave plain."""
    tensors = {f"ngram.table.shard_{i}.weight": e4m3(2, 8, code=ONE + 8 * i) for i in range(3)}
    tensors["ngram.table.weight_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)
    listed = {"modules_to_not_convert": ["ngram"], "exclude_modules": ["*ngram*"]}
    settings = {**FP8, "quant_algo": "FP8", **listed, "quant_method": method}
    view = view_of(release(tmp_path, tensors, settings))
    assert set(view.source.tensors) == set(tensors) - {"ngram.table.weight_scale"}
    for i in range(3):
        rows = rows_of(tmp_path, view, f"ngram.table.shard_{i}.weight", step=1)
        np.testing.assert_array_equal(rows, np.full((2, 8), 0.5 * 2**i))


def test_a_part_without_the_scale_of_its_table(tmp_path):
    found = problems(tmp_path, {"ngram.table.shard_0.weight": e4m3(2, 8)}, FP8)
    assert found == [
        "ngram.table.shard_0.weight: is FP8 with no ngram.table.shard_0.weight_scale_inv; "
        "it cannot be decoded"
    ]


def test_fbgemm_has_a_scale_per_row(tmp_path):
    tensors = named(weight=e4m3(3, 8), weight_scale=torch.tensor([[1.0], [2.0], [4.0]]))
    view = view_of(release(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}))
    np.testing.assert_array_equal(rows_of(tmp_path, view, step=2)[:, 0], [1, 2, 4])


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_modelopt_nvfp4(place, tmp_path):
    """Codes low nibble first, times a block scale, times the scale of the tensor."""
    packed = torch.full((2, 16), 0x21, dtype=torch.uint8)  # 0.5, 1.0
    tensors = named(
        weight=packed,
        weight_scale=torch.tensor([[1.0, 2.0], [4.0, 8.0]]).to(torch.float8_e4m3fn),
        weight_scale_2=torch.tensor(0.5),
        input_scale=torch.tensor(1.0),
    )
    settings = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    if place == "config.json":
        release(tmp_path, tensors, {**settings, "quant_method": "modelopt"})
    else:
        release(tmp_path, tensors, None)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        whole = {"producer": {"name": "modelopt"}, "quantization": settings}
        (tmp_path / place).write_text(json.dumps(whole))
    view = view_of(tmp_path)
    rows = rows_of(tmp_path, view)
    assert rows[0, :2].tolist() == [0.25, 0.5]
    assert rows[1, 14:18].tolist() == [1, 2, 2, 4]
    assert view.coded[WEIGHT].native is None


def test_gpt_oss_blocks_are_transposed(tmp_path):
    blocks = torch.zeros((1, 2, 1, 16), dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x72  # 1.0, then 6.0
    blocks[0, 1, 0, 15] = 0x9F  # -6.0, then -0.5
    scales = torch.tensor([[[128], [126]]], dtype=torch.uint8)
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    view = view_of(release(tmp_path, tensors, {"quant_method": "mxfp4"}))
    rows = rows_of(tmp_path, view, "experts.down_proj")
    assert rows.shape == (1, 32, 2)
    assert rows[0, :2, 0].tolist() == [2.0, 12.0]
    assert rows[0, 30:, 1].tolist() == [-3.0, -0.25]


def test_bitnet_rows_lie_a_quarter_apart(tmp_path):
    """The example in transformers' unpack_weights, and the two ways of applying the scale."""
    packed = torch.tensor([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], dtype=torch.uint8)
    ternary = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    tensors = named(weight=packed, weight_scale=torch.tensor([2.0]))
    for linear, scale in (("bitlinear", 0.5), ("autobitlinear", 2.0)):
        settings = {"quant_method": "bitnet", "linear_class": linear}
        view = view_of(release(tmp_path, tensors, settings))
        rows = rows_of(tmp_path, view, step=3)
        np.testing.assert_array_equal(rows, scale * np.array(ternary))


def test_bitnet_codes_are_kept_in_two_bits(tmp_path):
    generator = np.random.default_rng(0)
    ternary = generator.integers(0, 3, (8, 64)).astype(np.uint8)
    packed = sum(ternary[2 * part : 2 * part + 2] << (2 * part) for part in range(4))
    tensors = named(weight=torch.from_numpy(packed), weight_scale=torch.tensor([0.75]))
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    view = view_of(release(tmp_path, tensors, settings))
    parts = stored_of(tmp_path, view, "BF16", step=3)
    shifts = np.arange(16, dtype=np.uint32) * 2
    codes = (parts["weight"][:, :, None] >> shifts) & 3
    np.testing.assert_array_equal(codes.reshape(8, 64), ternary)
    assert set(parts["scales"].astype(float).ravel()) == {0.75}
    assert set(parts["biases"].astype(float).ravel()) == {-0.75}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def gptq(columns=64, out=32, groups=2, zeros=0x77777777):
    def filled(value, *shape):
        return torch.from_numpy(np.full(shape, value, np.uint32).view(np.int32))

    return named(
        qweight=filled(0x99999999, columns // 8, out),
        qzeros=filled(zeros, groups, out // 8),
        scales=torch.full((groups, out), 0.5).half(),
        g_idx=torch.arange(columns, dtype=torch.int32) // 32,
    )


@pytest.mark.parametrize(
    ("format", "zeros"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888 - (1 << 32))]
)
def test_gptq_zero_point_conventions(format, zeros, tmp_path):
    tensors = gptq(zeros=zeros & 0xFFFFFFFF)
    view = view_of(release(tmp_path, tensors, {**GPTQ, "checkpoint_format": format}))
    np.testing.assert_array_equal(rows_of(tmp_path, view), np.full((32, 64), 0.5))


def test_gptq_that_is_not_symmetric_as_it_says(tmp_path):
    view = view_of(release(tmp_path, gptq(zeros=0x66666666), GPTQ))
    with pytest.raises(
        BadCodesError, match=r"lin\.qweight, rows from 0: zero points are not all 8"
    ):
        rows_of(tmp_path, view)


def test_gptq_that_is_scattered_as_it_does_not_say(tmp_path):
    tensors = gptq()
    tensors[f"{LINEAR}.g_idx"] = tensors[f"{LINEAR}.g_idx"].flip(0)
    view = view_of(release(tmp_path, tensors, GPTQ))
    with pytest.raises(BadCodesError, match="g_idx scatters groups"):
        rows_of(tmp_path, view)


def test_scattered_groups_have_no_counterpart(tmp_path):
    view = view_of(release(tmp_path, gptq(), {**GPTQ, "desc_act": True}))
    assert view.coded[WEIGHT].native is None
    tensors = gptq()
    tensors[f"{LINEAR}.g_idx"][3] = 7
    view = view_of(release(tmp_path / "bad", tensors, {**GPTQ, "desc_act": True}))
    with pytest.raises(BadCodesError, match="g_idx names groups outside of 0 to 1"):
        rows_of(tmp_path / "bad", view)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 5}, "states 5 bits in groups of 32, which GPTQ does not have"),
        ({"bits": "4"}, "states '4' bits"),
        ({"group_size": 0}, "in groups of 0"),
        ({"group_size": 1 << 40}, "in groups of"),
        ({"group_size": 16}, r"lin.scales: is \[2, 32\], but lin.qweight and config.json make it"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is laid out for one kernel"),
        ({"dynamic": {"+:(a+)+$": {}}}, "repeats repetitions"),
        ({"dynamic": {"-:lin": {}}}, "leaves it unquantized"),
        ({"modules_to_not_convert": ["lin"]}, "says that it is not quantized"),
        ({"modules_to_not_convert": "lin"}, "must be a list of names"),
    ],
)
def test_gptq_settings_that_contradict_the_headers(change, said, tmp_path):
    import re

    found = problems(tmp_path, gptq(), {**GPTQ, **change})
    assert any(re.search(said, line) for line in found), found


def test_all_problems_at_once(tmp_path):
    tensors = gptq()
    del tensors[f"{LINEAR}.scales"]
    tensors[f"{LINEAR}.qzeros"] = tensors[f"{LINEAR}.qzeros"][:1].clone()
    tensors["other.qweight"] = torch.zeros((4, 4))
    found = problems(tmp_path, tensors, GPTQ)
    assert any(
        "missing: lin.scales, without which lin.qweight cannot be decoded" in f for f in found
    )
    assert any(f.startswith("lin.qzeros: is [1, 4]") for f in found)
    assert any(f.startswith("other.qweight: is F32, where I32 or U32 is expected") for f in found)


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        (named(weight=e4m3(4, 32)), FP8, "is FP8 with no lin.weight_scale_inv"),
        (
            named(weight=e4m3(4, 32), weight_scale_inv=torch.ones(4, 1)),
            FP8,
            r"lin.weight_scale_inv: is \[4, 1\], but lin.weight and config.json make it \[2, 1\]",
        ),
        (
            named(weight=e4m3(4, 32), weight_scale_inv=torch.ones(2, 1)),
            {**FP8, "weight_block_size": [0, 128]},
            "weight_block_size is",
        ),
        (
            named(weight=e4m3(4, 32), weight_scale_inv=torch.ones(2, 1)),
            {**FP8, "modules_to_not_convert": ["lin"]},
            "says that it is not quantized",
        ),
        (named(weight=torch.ones(2, 2)), {"quant_method": "hqq"}, "quantized with 'hqq'"),
        (named(weight=torch.ones(2, 2)), {"quant_method": ["x"]}, "which is not decoded"),
        (named(weight=torch.ones(2, 2)), FP8, "says fp8, but no tensor is quantized so"),
        (
            {"x_blocks": torch.zeros((1, 2, 16), dtype=torch.uint8)},
            {"quant_method": "mxfp4"},
            "x_blocks: is U8",
        ),
        (
            named(qweight=torch.zeros((48, 4), dtype=torch.int32)),
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
            "48 columns do not divide into groups of 32",
        ),
        (
            named(qweight=torch.zeros((48, 4), dtype=torch.int32)),
            {"quant_method": "awq", "bits": 4, "version": "gemv_fast"},
            "only version gemm",
        ),
        (
            named(weight=torch.zeros((32, 1), dtype=torch.uint8)),
            {"quant_method": "bitnet", "quantization_mode": "online"},
            "BitNet 'bitlinear' quantized 'online'",
        ),
        (
            named(weight_scale=torch.ones(1)),
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_algo is 'W4A8_AWQ'",
        ),
        (
            named(SCB=torch.ones(3), weight=torch.zeros((2, 32), dtype=torch.int8)),
            {"quant_method": "bitsandbytes"},
            r"lin.SCB: is \[3\]",
        ),
    ],
)
def test_contradictions(tensors, settings, said, tmp_path):
    import re

    found = problems(tmp_path, tensors, settings)
    assert any(re.search(said, line) for line in found), found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config changes"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config changes"),
        ({"config_groups": {}}, "without config_groups"),
        ({"ignore": ["re:(.*a)*b"]}, "repeats repetitions"),
        ({"ignore": ["re:("]}, "is no regular expression"),
        ({"ignore": ["re:li.*"]}, "says that it is not quantized"),
    ],
)
def test_compressed_tensors_settings(change, said, tmp_path):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    tensors = named(
        weight_packed=torch.zeros((2, 4), dtype=torch.int32), weight_scale=torch.ones(2, 1)
    )
    view_of(release(tmp_path / "good", tensors, settings))
    found = problems(tmp_path, tensors, {**settings, **change})
    assert any(said in line for line in found), found


def test_a_nan_scale_is_named_where_it_lies(tmp_path):
    scales = torch.ones(2, 1)
    scales[1, 0] = torch.nan
    tensors = named(weight=e4m3(4, 32), weight_scale_inv=scales)
    view = view_of(release(tmp_path, tensors, FP8))
    with pytest.raises(
        BadCodesError, match=r"lin\.weight, rows from 2: the scale of row 0, group 0"
    ):
        rows_of(tmp_path, view, step=2)


def test_e8m0_nan_and_scales_between_powers_of_two(tmp_path):
    settings = {**FP8, "scale_fmt": "ue8m0"}
    scales = torch.tensor([[127], [255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = named(weight=e4m3(4, 32), weight_scale_inv=scales)
    view = view_of(release(tmp_path, tensors, settings))
    with pytest.raises(BadCodesError, match="is NaN or infinite"):
        stored_of(tmp_path, view, "BF16")
    tensors = named(weight=e4m3(4, 32), weight_scale_inv=torch.tensor([[1.0], [1.5]]))
    view = view_of(release(tmp_path / "between", tensors, settings))
    with pytest.raises(BadCodesError, match=r"is 1\.5, not a power of two"):
        stored_of(tmp_path / "between", view, "BF16")


def test_nan_codes_are_not_repacked(tmp_path):
    tensors = named(weight=e4m3(4, 32, code=0xFF), weight_scale_inv=torch.ones(2, 1))
    view = view_of(release(tmp_path, tensors, {**FP8, "scale_fmt": "ue8m0"}))
    with pytest.raises(BadCodesError, match="row 0, column 0 is NaN"):
        stored_of(tmp_path, view, "BF16")


@pytest.mark.parametrize("change", [{"shape": [4, 8]}, {"blocksize": 128}, None])
def test_bitsandbytes_state_that_contradicts_the_plan(change, tmp_path):
    """The shape lies in a JSON tensor: planned from the map, checked when rows are read."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 16]}
    text = json.dumps(state | change) if change else "{"
    tensors = {
        WEIGHT: torch.zeros((64, 1), dtype=torch.uint8),
        f"{WEIGHT}.absmax": torch.ones(2),
        f"{WEIGHT}.quant_map": torch.linspace(-1, 1, 16),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode())).byte(),
    }
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    view = view_of(release(tmp_path, tensors, settings), (8, 16))
    with pytest.raises(BadCodesError, match="contradicts the headers" if change else "is damaged"):
        rows_of(tmp_path, view)
    assert any(
        "no matrix that config.json makes it" in p
        for p in problems(tmp_path / "other", tensors, settings, shape=(8, 24))
    )
