"""Which tensors are quantized, with which numbers, and the linear layers that compute with them.

``recipe.py`` reads patterns on Hugging Face module names, ``layers.py`` holds the emulated NVFP4 linear layers,
``state.py`` keeps their quantizers: calibration, the once-per-step weight quantization, the error per layer.
"""
