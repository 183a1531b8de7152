"""Llama and Mistral: a begin-of-text token opens every prompt."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family

FAMILY = Family(
    add_bos=True,
    specials=("<|begin_of_text|>", *CHAT_TOKENS),
    tokens=MappingProxyType({"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|endoftext|>"}),
)
