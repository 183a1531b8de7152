"""Parity of checkpoints larger than memory: both sides computed block by block."""
