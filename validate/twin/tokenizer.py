"""Train and write a twin's tokenizer: small, deterministic, and with exactly the config's ids."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from validate.twin.corpus import CORPUS
from validate.twin.errors import TwinError
from validate.twin.family import Family, Json
from validate.twin.tokens import TokenPlan

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How the Qwen and Llama 3 tokenizers split text into words, from their published tokenizer.json.
WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MODEL_MAX_LENGTH: Final = 2048
TEMPLATE: Final = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] in ['image', 'image_url'] -%}
{{ IMAGE }}
{%- elif item['type'] == 'video' -%}
{{ VIDEO }}
{%- elif item['type'] == 'audio' -%}
{{ AUDIO }}
{%- else -%}
{{ item['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def write_tokenizer(out: Path, plan: TokenPlan, family: Family, *, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and, for chat models, chat_template.jinja.

    The tokenizer has exactly ``vocab_size`` tokens, so every id a twin can emit decodes.
    """
    settings: Json = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "tokenizer_class": family.tokenizer_class,
    }
    tokenizer, extra = TRAINERS[family.tokenizer](plan, family, vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise TwinError(
            f"the twin's tokenizer has {tokenizer.get_vocab_size()} tokens where its config says "
            f"{vocab_size}; choose a vocab_size nearer to {tokenizer.get_vocab_size()}"
        )
    settings |= extra
    tokenizer.save(str(out / "tokenizer.json"))
    if family.tokenizer == "sentencepiece":
        (out / "tokenizer.model").write_bytes(_pieces(plan.first_id))
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if family.tokenizer != "wordpiece" and family.template != "":
        (out / "chat_template.jinja").write_text(chat_template(family), encoding="utf-8")


def chat_template(family: Family) -> str:
    """ChatML or the family's own, with its markup where an image, a sound or a video stands."""
    text = (family.template or TEMPLATE).replace("{{ IMAGE }}", json_literal(family.image_markup))
    text = text.replace("{{ AUDIO }}", json_literal(family.audio_markup))
    return text.replace("{{ VIDEO }}", json_literal(family.video_markup))


def json_literal(markup: str | None) -> str:
    """A Jinja expression that prints ``markup``, newline included; nothing for None."""
    return "{{ " + json.dumps(markup or "") + " }}"


def _byte_bpe(plan: TokenPlan, family: Family, vocab_size: int) -> tuple["Tokenizer", Json]:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=plan.first_id,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    _add_specials(tokenizer, plan)
    settings: Json = {
        "bos_token": family.silent_bos,
        "eos_token": family.stop_tokens[0],
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
    }
    if family.add_bos:
        bos = family.specials[0]
        settings["bos_token"] = bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, plan.id_of(bos))],
        )
    if family.named_tokens:
        settings["extra_special_tokens"] = dict(family.named_tokens)
    return tokenizer, settings


def _wordpiece(plan: TokenPlan, family: Family, vocab_size: int) -> tuple["Tokenizer", Json]:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    del family
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(plan.specials), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, plan.id_of(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = ("cls_token", "mask_token", "pad_token", "sep_token", "unk_token")
    tokens = ("[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UNK]")
    return tokenizer, {"do_lower_case": True, **dict(zip(names, tokens, strict=True))}


@cache
def _pieces(count: int) -> bytes:
    """A SentencePiece model of ``count`` pieces, with one for each byte."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=made,
        model_type="unigram",
        vocab_size=count,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        character_coverage=0.99,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return made.getvalue()


def _sentencepiece(plan: TokenPlan, family: Family, vocab_size: int) -> tuple["Tokenizer", Json]:
    """The pieces as ``tokenizers`` takes them; special tokens lie behind them, as in releases."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram

    del vocab_size
    model = sentencepiece.SentencePieceProcessor(model_proto=_pieces(plan.first_id))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_specials(tokenizer, plan)
    end, first, last = family.stop_tokens[-1], *family.specials[1:3]
    added = {
        str(plan.id_of(token)): {"content": token, "special": True, "normalized": False}
        for token in plan.specials
    }
    return tokenizer, {
        **{"bos_token": first, "cls_token": first, "eos_token": last, "sep_token": last},
        **{"mask_token": end, "pad_token": end, "unk_token": "<unk>"},
        **{"additional_special_tokens": list(plan.specials), "added_tokens_decoder": added},
    }


def _add_specials(tokenizer: "Tokenizer", plan: TokenPlan) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in plan.specials]
    )


Trainer = Callable[[TokenPlan, Family, int], tuple["Tokenizer", Json]]
TRAINERS: Final[dict[str, Trainer]] = {
    "byte_bpe": _byte_bpe,
    "sentencepiece": _sentencepiece,
    "wordpiece": _wordpiece,
}
