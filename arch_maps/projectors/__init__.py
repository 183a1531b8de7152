"""Parts between an encoder and the language model."""
