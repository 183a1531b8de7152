"""``generate`` on the command line, and the Python calls behind it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from validate.acceptance import needs
from validate.acceptance.bench import QUESTION, TOKENS, Bench, reply_of
from validate.acceptance.facts import PROCESSOR_FILES, Continued
from validate.acceptance.model import Found, NotApplicable, Row, RowFailure
from validate.acceptance.process import arguments
from validate.acceptance.replies import CEILINGS, ROUNDING, TIES

_MEDIA_RULE: Final = (
    "the command ends well and prints the greedy text of the Python call, whose log-probabilities "
    "change when another file of the same kind is shown"
)


def printed(bench: Bench, runtime: str, *words: str) -> str:
    """What ``generate`` prints for the usual question, decoding greedily."""
    options = arguments(model=bench.facts.folder, prompt=QUESTION, max_tokens=TOKENS)
    greedy = (
        ("--temperature", "0") if runtime == "mlx_vlm" else ("--temp", "0", "--verbose", "False")
    )
    return bench.run(runtime, "generate", *options, *greedy, *words).strip("\n")


def require_printed(wanted: str, shown: str) -> None:
    """The text that a program printed last is the one that is wanted."""
    if not shown.rstrip().endswith(wanted.strip()) or (not wanted.strip() and shown.strip()):
        raise RowFailure(f"generate printed {shown!r} where the Python call gives {wanted!r}")


def _text(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        wanted = bench.python(runtime, "text")
        require_printed(wanted["text"], printed(bench, runtime))
        return Found(
            note=f"{wanted['completion_tokens']} tokens, as the Python call gives them",
            metrics={"tokens": wanted["completion_tokens"], "finish": wanted["finish"]},
        )

    return run


def _media(job: str, **flags: str) -> Callable[[Bench], Found]:
    """A row of ``generate`` with files; ``flags`` are its arguments and the files' names."""

    def run(bench: Bench) -> Found:
        if bench.facts.lacks_processor:
            raise RowFailure(
                f"none of {', '.join(PROCESSOR_FILES)} is there: the runtime would prepare media "
                "by defaults of its own"
            )
        wanted = bench.python("mlx_vlm", job)
        other = bench.python("mlx_vlm", f"{job}, other")
        files = {kind: getattr(bench.media, name) for kind, name in flags.items()}
        require_printed(wanted["text"], printed(bench, "mlx_vlm", *arguments(**files)))
        alone = bench.python("mlx_vlm", "text")["prompt_tokens"]
        if reply_of(wanted).steps[:1] == reply_of(other).steps[:1]:
            raise RowFailure(f"the answer does not depend on the {job.partition(' ')[0]}")
        return Found(
            note=f"{wanted['prompt_tokens']} prompt tokens, {alone} without; another file gives "
            "other log-probabilities",
            metrics={"prompt tokens": wanted["prompt_tokens"]},
        )

    return run


def _api(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        streamed = bench.python(runtime, "text")
        whole = bench.python(runtime, "text whole")
        if streamed["text"] != whole["text"]:
            raise RowFailure(
                f"generate gives {whole['text']!r}, stream_generate {streamed['text']!r}"
            )
        if not streamed["completion_tokens"]:
            raise RowFailure("stream_generate gave no token")
        return Found(note=f"load, generate and stream_generate agree: {whole['text']!r}")

    return run


def _torch(runtime: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        told = {name: bench.python(runtime, f"torch {name}")["steps"] for name in bench.facts.torch}
        return judge_continuations(bench.facts.torch, told, computing=bench.facts.computing)

    return run


def judge_continuations(
    torch: Mapping[str, Continued],
    told: Mapping[str, Sequence[tuple[int, float, float]]],
    *,
    computing: str,
) -> Found:
    """Hold (token, log-probability, lead) of each prompt's answer against torch's tokens.

    RowFailure for log-probabilities that rounding does not explain, and for another token whose
    lead is more than twice the largest difference on the tokens before.
    """
    shared: dict[str, int] = {}
    differences = [0.0]
    for name, wanted in torch.items():
        pairs = list(zip(wanted.tokens, told[name], strict=False))
        at = next((i for i, (token, step) in enumerate(pairs) if token != step[0]), len(pairs))
        shared[name] = at
        before = zip(wanted.logprobs, told[name][:at], strict=False)
        differences += [abs(logprob - step[1]) for logprob, step in before]
    noise = max(differences, key=lambda one: math.inf if math.isnan(one) else one)
    if not noise <= ROUNDING[computing]:  # NaN is no rounding either
        raise RowFailure(
            f"log-probabilities of the same tokens differ from torch's by {noise:.2g} nats, which "
            f"computing in {computing} does not explain"
        )
    # An earlier report tells tokens alone; then what two runs may differ by stands for the noise.
    measured = any(wanted.logprobs for wanted in torch.values())
    bound = TIES * (noise if measured else CEILINGS[computing])
    ties = 0
    for name, wanted in torch.items():
        at, steps = shared[name], told[name]
        if at == min(len(wanted.tokens), len(steps)):
            continue
        token, _, lead = steps[at]
        if not lead <= bound:
            raise RowFailure(
                f"{name}: token {at} is {token} where torch has {wanted.tokens[at]}, and the "
                f"runtime's led by {lead:.3g} nats, where at most {bound:.2g} is rounding"
            )
        ties += 1
    total = sum(min(len(torch[name].tokens), len(told[name])) for name in torch)
    note = f"{sum(shared.values())} of {total} tokens of {len(torch)} prompts as torch wrote them"
    return Found(
        note=note
        + (f"; {ties} parted at a near tie" if ties else "")
        + f"; log-probabilities within {noise:.2g} of torch's" * measured,
        metrics={
            **{"equal tokens": sum(shared.values()), "tokens": total, "near ties": ties},
            "noise": noise,
        },
    )


def _vision_cache(bench: Bench) -> Found:
    second = bench.python("mlx_vlm", "vision cache")
    plain = reply_of(bench.python("mlx_vlm", "image"))
    if not second["encodes"]:
        raise NotApplicable(
            "the runtime's model of this type gives nothing to cache (encode_image)"
        )
    if second["hits"] != 1:
        raise RowFailure(f"the second look found {second['hits']} cached features instead of 1")
    same = bench.same([("with cached features", plain, reply_of(second))])
    if second["first"] != plain.text:
        raise RowFailure(f"first look through the cache: {second['first']!r}, not {plain.text!r}")
    return Found(note=f"the second look took cached features; {same}", metrics=same.metrics())


_TORCH_RULE: Final = (
    "the plain prompts of the parity report go on with torch's greedy tokens; where one parts, the "
    "runtime's token led by no more than twice the largest difference from torch's "
    "log-probabilities on the tokens before, which itself is at most "
    + " or ".join(f"{nats:g} nats computing in {what}" for what, nats in ROUNDING.items())
)

ROWS: Final = (
    Row(
        name="generate text",
        runtime="mlx_vlm",
        rule="the command ends well and prints the greedy text of the Python call",
        run=_text("mlx_vlm"),
    ),
    Row(
        name="generate image",
        runtime="mlx_vlm",
        rule=_MEDIA_RULE,
        run=_media("image", image="image"),
        needs=(needs.sees,),
    ),
    Row(
        name="generate audio",
        runtime="mlx_vlm",
        rule=_MEDIA_RULE,
        run=_media("audio", audio="audio"),
        needs=(needs.hears,),
    ),
    Row(
        name="generate image and audio",
        runtime="mlx_vlm",
        rule=_MEDIA_RULE,
        run=_media("image and audio", image="image", audio="audio"),
        needs=(needs.sees, needs.hears),
    ),
    Row(
        name="generate video",
        runtime="mlx_vlm",
        rule=_MEDIA_RULE,
        run=_media("video", video="video"),
        needs=(needs.sees,),
    ),
    Row(
        name="Python calls",
        runtime="mlx_vlm",
        rule="load, generate and stream_generate give the same text",
        run=_api("mlx_vlm"),
    ),
    Row(
        name="torch's greedy tokens",
        runtime="mlx_vlm",
        rule=_TORCH_RULE,
        run=_torch("mlx_vlm"),
        needs=(needs.compared,),
    ),
    Row(
        name="vision feature cache",
        runtime="mlx_vlm",
        rule="a second question about a picture takes its features from the cache and gives the "
        "text that it gives without one",
        run=_vision_cache,
        needs=(needs.sees,),
    ),
    Row(
        name="generate text",
        runtime="mlx_lm",
        rule="the command ends well and prints the greedy text of the Python call",
        run=_text("mlx_lm"),
    ),
    Row(
        name="Python calls",
        runtime="mlx_lm",
        rule="load, generate and stream_generate give the same text",
        run=_api("mlx_lm"),
    ),
    Row(
        name="torch's greedy tokens",
        runtime="mlx_lm",
        rule=_TORCH_RULE,
        run=_torch("mlx_lm"),
        needs=(needs.compared,),
    ),
)
