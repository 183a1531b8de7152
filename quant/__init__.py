"""Weight and KV-cache quantization in the formats that MLX runtimes read."""
