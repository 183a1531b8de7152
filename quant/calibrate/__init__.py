"""Statistics of a model's activations on calibration text, for the calibrated methods."""
