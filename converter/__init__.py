"""From a Hugging Face release to a proven, published MLX checkpoint."""
