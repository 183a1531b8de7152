"""Runs in a child process of its own: the tokenizer that a GGUF file holds, written as a release's.

Only the standard library and transformers are imported here, because ``validate.child`` runs this
file by its path, isolated from the caller's environment. The vocabulary is a stranger's: building a
tokenizer of it may fail in any way, or take forever.

transformers builds it. What it leaves out for SentencePiece vocabularies is put right here: the
blank that is put before a text is put there also where the text begins with one, and is left out
where the file says so (``tokenizer.ggml.add_space_prefix``), so that decoding gives back the text.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

BLANK = "\u2581"
"""What stands for a blank in pieces."""
USER_DEFINED, NORMAL = 4, 1
PHI3 = "phi3"
"""Its special tokens take away the white space behind them, and put one blank there; but for three.

The files do not say so; llama.cpp has it in ``llama_vocab::impl::load``.
"""
PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
UNPREFIXED = ("gemma", "gemma2", "gemma3")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The names of the tokenizer's files in the folder ``out``, or why there are none."""
    try:
        return {"files": write(request["path"], Path(request["out"]))}
    except MemoryError:
        return {"problem": "needs more memory than it may use"}
    except Exception as error:  # whatever the libraries raise of such a vocabulary
        return {"problem": f"{type(error).__name__}: {error}"}


def write(path: str, out: Path) -> list[str]:
    """Build the tokenizer of the GGUF file ``path`` and save it."""
    transformers: Any = import_module("transformers")
    reading: Any = import_module("transformers.integrations.gguf")
    architecture, vocabulary, settings = reading.get_gguf_tokenizer(path)
    sentencepiece = vocabulary.get("tokenizer_type") == "llama" and architecture not in UNPREFIXED
    prefix = vocabulary.get("add_prefix_space", True)
    if sentencepiece and prefix:
        join_blanks(vocabulary)
    backend, more = reading.convert_gguf_tokenizer(architecture, vocabulary)
    if sentencepiece:
        if architecture == PHI3:
            backend = stripping(backend)
        set_prefix(backend, architecture, prefix=prefix)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **more)
    made.encode("It takes text.")
    return [Path(name).name for name in made.save_pretrained(out) if Path(name).exists()]


def join_blanks(vocabulary: dict[str, Any]) -> None:
    """Let user-defined pieces of two blanks, three ... be merged, not cut out of the raw text.

    Cut out they would not see the blank that is put before it. Merges find the longest, as
    SentencePiece does, where every length is there. One that the vocabulary also has under the
    pieces' own spelling stays as it is: two ids cannot share that.
    """
    tokens, kinds = list(vocabulary["tokens"]), list(vocabulary.get("token_type") or ())
    runs = {
        index: len(token)
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == USER_DEFINED and token and not token.strip(f" {BLANK}")
    }
    if {*runs.values(), 1} != set(range(1, len(runs) + 2)):
        return
    for index, length in runs.items():
        if BLANK * length not in (*tokens[:index], *tokens[index + 1 :]):
            tokens[index], kinds[index] = BLANK * length, NORMAL
    vocabulary |= {"tokens": tokens, "token_type": kinds}


def stripping(backend: Any) -> Any:
    """The tokenizer with special tokens that take away the white space behind them."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] not in PHI3_PLAIN
    return type(backend).from_str(json.dumps(state))


def set_prefix(backend: Any, architecture: str, *, prefix: bool) -> None:
    """Put one blank before a text, whatever it begins with, and take one away in decoding; or none.

    A ``Metaspace`` puts none before what begins with its own sign. So the first one, whose sign is
    the plain blank, sees a text in which there are only the pieces' blanks, and puts one before the
    text's start; the second makes that the pieces' blank as well.
    """
    tokenizers: Any = import_module("tokenizers")
    pre, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not prefix:
        backend.normalizer = None
        backend.pre_tokenizer = pre.Metaspace(BLANK, prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(steps)
        return
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)])
    if architecture != PHI3:
        backend.normalizer = tokenizers.normalizers.Replace(" ", BLANK)
        backend.pre_tokenizer = pre.Sequence(
            [
                pre.Metaspace(" ", prepend_scheme="first", split=False),
                pre.Metaspace(BLANK, prepend_scheme="never", split=False),
            ]
        )
