"""Smaller and faster models: distillation, structured pruning, int8 quantization."""
