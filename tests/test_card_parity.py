"""A parity report as a card sums it up."""

from typing import Any

from model_cards.parity import parity_view


def check(name: str, runtime: str, value: object, verdict: str = "pass", **more: Any) -> dict:
    known = {"name": name, "modality": "text", "runtime": runtime, "value": value}
    return {**known, "threshold": 1e-4, "verdict": verdict, "metrics": {}, **more}


def test_a_report_is_summed_up_by_the_worst_of_each_check() -> None:
    rows = [
        check("logits", "mlx_vlm", 1e-6),
        check("logits", "mlx_lm", 9e-5),
        check("logits", "mlx_lm", 2e-6, modality="code"),
        check("greedy", "mlx_vlm", 12, threshold=12),
        check("greedy", "mlx_lm", 14, threshold=12),
        check("decode", "mlx_vlm", 5e-5),
        check("decode", "mlx_lm", "nan", "fail"),
        check("noise", "mlx_lm", 3e-5, "fail"),
        check("deviation", "mlx_vlm", 0.1, "info", note="its GELU is another", modality="image"),
        check("video/processor", "mlx_vlm", None, "info", note="prepared by the runtime")
        | {"modality": "video"},
        check("loss", "mlx_vlm", 0.1, "info", metrics={"kl_mean": 0.01234, "top1": 0.5}),
    ]
    view = parity_view({"verdict": "fail", "plan": "p", "checks": rows}, plan_hash="p")
    assert view is not None
    told = [(r.name, r.inputs, r.runtimes, r.worst, r.verdict) for r in view.summary]
    assert told == [
        ("logits", "text, code", "mlx-vlm, mlx-lm", "9e-05", "pass"),
        ("greedy", "text", "mlx-vlm, mlx-lm", "12", "pass"),
        ("decode", "text", "mlx-vlm, mlx-lm", "nan", "1 of 2 fail"),
        ("noise", "text", "mlx-lm", "3e-05", "fail"),
    ]
    assert view.deviations == (
        "mlx-vlm, image, where stock outputs are off by 0.1: its GELU is another",
    )
    assert view.remarks == ("mlx-vlm, video: prepared by the runtime",)
    (loss,) = view.losses
    assert (loss.perplexity, loss.kl_mean, loss.kl_p99, loss.top1) == ("-", "0.0123", "-", "50.0 %")
