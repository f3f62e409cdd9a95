"""Post-training quantization: scales, equalization, rounding, biases."""
