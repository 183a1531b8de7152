"""Statistics of a model's activations on calibration text, for methods "imatrix" and "gptq"."""
