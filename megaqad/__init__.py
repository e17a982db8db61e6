"""megaqad: recover a model's behaviour in NVFP4 by quantization-aware distillation on Megatron-Core."""

__version__ = "0.1.0"
