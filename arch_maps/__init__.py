"""Declarative maps from Hugging Face checkpoints to the layouts that MLX runtimes read."""
