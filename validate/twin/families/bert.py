"""BERT encoders: WordPiece tokens, no chat and no generation."""

from types import MappingProxyType

from validate.twin.family import Family

FAMILY = Family(
    tokenizer="wordpiece",
    tokenizer_class="BertTokenizer",
    specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    tokens=MappingProxyType({"pad_token_id": "[PAD]"}),
    stop_tokens=(),
)
