"""Train and write a twin's tokenizer: small, deterministic, and with exactly the config's ids."""

import json
from collections.abc import Callable
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
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if family.tokenizer == "byte_bpe" and family.template != "":
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


def _add_specials(tokenizer: "Tokenizer", plan: TokenPlan) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in plan.specials]
    )


Trainer = Callable[[TokenPlan, Family, int], tuple["Tokenizer", Json]]
TRAINERS: Final[dict[str, Trainer]] = {"byte_bpe": _byte_bpe, "wordpiece": _wordpiece}
