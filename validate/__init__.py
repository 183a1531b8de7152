"""Twins, and numerical parity of a converted checkpoint against its torch reference."""
