"""KV-cache quantization: rotations, codebooks, codes, and caches that the stock runtimes take."""
