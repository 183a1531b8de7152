"""What the reference answers when it is run block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from validate.answers import Answers, text_questions
from validate.checks import Check
from validate.streamed.reference import GREEDY_TOKENS, StreamedReference
from validate.streamed.tensors import Streaming

if TYPE_CHECKING:
    from validate.judgement import Judgement

NAME: Final = "streamed"
"""Name of the row that says that a report is of a streamed run, and what that leaves out."""
_CODES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def ask_streamed(streaming: Streaming, judgement: Judgement) -> tuple[dict[str, Any], Answers]:
    """The reference's description, and its answers to every text prompt.

    Raises ReferenceError where the reference cannot be built or run block by block.
    """
    trust, say = judgement.trust_remote_code, judgement.progress
    exact, source = streaming.exact or streaming.source, streaming.source
    code = _CODES[judgement.dtype]
    rounds = streaming.exact is None and not judgement.quantized and not source.all_in(code)
    say("torch: building the reference, block by block")
    model = StreamedReference.open(
        exact, round_to=judgement.dtype if rounds else None, trust_remote_code=trust
    )
    described = {**model.describe(), "streamed": True}
    if rounds:
        described["rounded_to"] = judgement.dtype
    questions = text_questions(source.folder, vocab_size=model.vocab_size, trust_remote_code=trust)
    answers = Answers(exact=model.answers(questions, say))
    model.close()
    if rounds or streaming.exact is not None:
        say("torch: the original weights, block by block")
        model = StreamedReference.open(source, trust_remote_code=trust)
        answers = replace(answers, original=model.all_logits(questions))
        model.close()
    elif judgement.quantized:
        answers = replace(answers, original=tuple(a.logits for a in answers.exact))
    return described, answers


def streamed_row(streaming: Streaming, judgement: Judgement, media: Sequence[str]) -> Check:
    """What a streamed run is, and what it does not judge."""
    left = [f"{kind}s" for kind in media]
    if not judgement.quantized and judgement.dtype != "float32":
        left.append(f"the noise of computing in {judgement.dtype}")
    left += ["texts in one batch", "single modules"]
    return Check(
        name=NAME,
        modality="text",
        verdict="info",
        value=streaming.needed / 2**30,
        note=f"GiB that both sides would need whole, of {streaming.limit / 2**30:.1f} GiB allowed; "
        "so reference and runtime were run block by block, with weights from the disk, and "
        f"{GREEDY_TOKENS} tokens of each greedy continuation were compared. Not judged in this "
        f"mode: {', '.join(left)}.",
        metrics={"needed_bytes": streaming.needed, "limit_bytes": streaming.limit},
    )
