"""Audio-encoder parts."""
