"""BERT and XLM-RoBERTa encoders: WordPiece tokens, no chat and no generation."""

from types import MappingProxyType

from validate.twin.family import Family, Json

FAMILY = Family(
    tokenizer="wordpiece",
    tokenizer_class="BertTokenizer",
    specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    tokens=MappingProxyType({"pad_token_id": "[PAD]"}),
    stop_tokens=(),
)

XLM_ROBERTA = Family(
    tokenizer="wordpiece",
    tokenizer_class="BertTokenizer",
    specials=("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
    tokens=MappingProxyType(
        {"bos_token_id": "[CLS]", "pad_token_id": "[PAD]", "eos_token_id": "[SEP]"}
    ),
    stop_tokens=(),
)


def _narrow(config: Json, source: Json) -> Json:
    """A window that the prompts outgrow."""
    del source
    config["local_attention"] = 16
    return config


MODERNBERT = Family(
    tokenizer="wordpiece",
    tokenizer_class="PreTrainedTokenizerFast",
    specials=("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
    tokens=MappingProxyType(
        {"bos_token_id": "[CLS]", "eos_token_id": "[SEP]", "pad_token_id": "[PAD]"}
        | {"cls_token_id": "[CLS]", "sep_token_id": "[SEP]"}
    ),
    stop_tokens=(),
    adjust=_narrow,
)
