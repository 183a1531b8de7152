"""Metrics against literal values and against torch."""

import math

import numpy as np
import pytest
import torch

from validate import metrics
from validate.pixels import compare_pixels


def test_kl_is_torchs() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 7, 50)) * 4
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.tensor(q), -1),
        torch.log_softmax(torch.tensor(p), -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    np.testing.assert_allclose(metrics.kl_divergence(p, q), expected.numpy(), rtol=1e-12)


def test_kl_literal() -> None:
    p = np.log([[0.5, 0.5]])
    q = np.log([[0.25, 0.75]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert metrics.kl_divergence(p, q)[0] == pytest.approx(expected, rel=1e-12)
    assert metrics.kl_divergence(p, p)[0] == 0.0


def test_kl_of_masked_entries() -> None:
    p = np.array([[0.0, 1.0, -np.inf]])
    assert metrics.kl_divergence(p, p)[0] == 0.0
    assert metrics.kl_divergence(p, np.array([[0.0, -np.inf, 1.0]]))[0] == np.inf


def test_compare_logits_literal() -> None:
    a = np.array([[1.0, -4.0, 2.0], [0.0, 3.0, 1.0]], dtype=np.float32)
    b = np.array([[1.0, -4.0, 0.5], [0.0, 3.0, 1.25]], dtype=np.float32)
    result = metrics.compare_logits(a, b)
    assert result.scale == 4.0
    assert result.error.tolist() == [1.5, 0.25]
    assert result.max_abs == 1.5
    assert result.relative == 0.375
    assert result.agree.tolist() == [False, True]
    assert result.squared.tolist() == [0.75, 0.0625 / 3]


def test_compare_logits_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 9, 11))
    whole = metrics.compare_logits(a, b)
    monkeypatch.setattr(metrics, "_BLOCK", 22)
    parts = metrics.compare_logits(a, b)
    np.testing.assert_array_equal(whole.kl, parts.kl)
    np.testing.assert_array_equal(whole.error, parts.error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    a = np.ones((2, 3))
    b = a.copy()
    b[1, 2] = bad
    for x, y in ((a, b), (b, a)):
        assert metrics.compare_logits(x, y).relative == np.inf
        assert metrics.relative_error(x, y) == np.inf


def test_both_nan_is_not_agreement() -> None:
    a = np.full((1, 3), np.nan)
    result = metrics.compare_logits(a, a)
    assert result.relative == np.inf
    assert metrics.summarize([result]).kl_mean == np.inf


def test_shared_masking_is_agreement() -> None:
    a = np.array([[1.0, -np.inf]])
    assert metrics.compare_logits(a, a).relative == 0.0


def test_relative_of_zero() -> None:
    assert metrics.relative(0.0, 0.0) == 0.0
    assert metrics.relative(1.0, 0.0) == np.inf
    assert metrics.relative(float("nan"), 1.0) == np.inf


def test_summary_is_over_all_positions() -> None:
    a = np.zeros((3, 2))
    a[:, 0] = 1.0
    b = a.copy()
    b[0] = [0.0, 1.0]
    summary = metrics.summarize([metrics.compare_logits(a, a), metrics.compare_logits(a, b)])
    assert summary.positions == 6
    assert summary.top1 == pytest.approx(5 / 6)
    assert summary.relative == 1.0
    assert summary.rms == pytest.approx(math.sqrt(1 / 6))
    assert summary.kl_mean == pytest.approx(summary.kl_max / 6)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        metrics.compare_logits(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no logits"):
        metrics.summarize([])


def test_first_divergence() -> None:
    assert metrics.first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert metrics.first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert metrics.first_divergence([1, 2], [1, 2, 3]) == 2


def test_cosine() -> None:
    a, b = np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]])
    assert metrics.cosine(a, b)[0] == pytest.approx(0.96)
    assert np.isnan(metrics.cosine(a, np.zeros((1, 2)))[0])


def test_pixels_in_different_layouts() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2, 6))
    packed = torch.tensor(np.concatenate([first, second], axis=-1)[None])
    assert compare_pixels(packed, [[first, second]]) == (0.0, "packed")
    picture = torch.tensor(rng.normal(size=(1, 3, 5, 7)), dtype=torch.float32)
    assert compare_pixels(picture, picture.numpy().copy()) == (0.0, "as is")
    last = picture.numpy().transpose(0, 2, 3, 1)
    assert compare_pixels(picture, last) == (0.0, "channels last")
    wrong, _ = compare_pixels(picture, last + 1.0)
    assert wrong > 0.1
    error, why = compare_pixels(picture, last[:, :4])
    assert error == np.inf
    assert "[[3, 5, 7]] against [[4, 7, 3]]" in why
