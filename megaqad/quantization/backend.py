"""Whether the chosen backend can run here: asked before a rank starts, so nothing heavier than torch is imported."""

import importlib.metadata
import re

from megaqad.errors import UserError
from megaqad.quantization.settings import QuantizationSettings

LEAST_CAPABILITY = (10, 0)
"""Of the GPU: Blackwell, the first with NVFP4."""
LEAST_VERSION = (2, 15)
"""Of Transformer Engine: the first whose NVFP4 recipe says what backward multiplies with (``backward_override``).
The ``cuda`` extra of pyproject.toml, which the container's build is checked with too, asks for the same."""


def check_backend(settings: QuantizationSettings, dtype: str) -> None:
    """Refuse ``quantization.backend=transformer_engine`` where it cannot run or would train something else.

    Args:
        dtype: ``runtime.dtype``.

    Raises:
        UserError: the recipe or the dtype is not Transformer Engine's; no GPU with NVFP4; not installed, or too old.
    """
    if settings.backend == "emulated":
        return
    asked = f"quantization.backend={settings.backend}"
    instead = "set quantization.backend=emulated"
    if (settings.weights, settings.activations) != ("nvfp4", "nvfp4"):
        raise UserError(
            f"{asked} computes NVFP4 weights times NVFP4 activations, not quantization.weights={settings.weights} with "
            f"quantization.activations={settings.activations}: {instead}"
        )
    if settings.formats or settings.kv_cache != "none":
        extra = "formats" if settings.formats else f"kv_cache={settings.kv_cache}"
        raise UserError(
            f"{asked} computes NVFP4 linear layers and nothing else, so not quantization.{extra}: {instead}"
        )
    if "lm_head" not in settings.exclude:
        raise UserError(
            f"{asked} leaves the output head to the loss: add lm_head to quantization.exclude, or {instead}"
        )
    if (settings.calibration, settings.weight_scales) != ("max", "refreshed"):
        raise UserError(
            f"{asked} takes scales from the largest weights, not quantization.calibration={settings.calibration} with "
            f"quantization.weight_scales={settings.weight_scales}: {instead}"
        )
    if settings.activation_scales != "static":
        raise UserError(
            f"{asked} takes one scale for all tokens at hand, not each token's own as quantization.activation_scales="
            f"{settings.activation_scales} asks: {instead}"
        )
    if settings.activation_percentile != 100:
        raise UserError(
            f"{asked} takes input scales from the inputs at hand, not quantization.activation_percentile="
            f"{settings.activation_percentile}: {instead}"
        )
    if dtype != "bfloat16":
        raise UserError(
            f"{asked} quantizes weights as they are, while the export rounds them to BF16 first, so runtime.dtype="
            f"{dtype} would train another function: set runtime.dtype=bfloat16, or {instead}"
        )
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{asked} needs a GPU with NVFP4, and this machine has no CUDA device: {instead}")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise UserError(
            f"{asked} needs a GPU with NVFP4, of compute capability 10.0 or above, and this one has "
            f"{capability[0]}.{capability[1]}: {instead}"
        )
    version = _transformer_engine_version()
    if version is None:
        raise UserError(f"{asked} needs Transformer Engine: pip install 'megaqad[cuda]', or {instead}")
    if version < LEAST_VERSION:
        raise UserError(
            f"{asked} needs Transformer Engine {'.'.join(map(str, LEAST_VERSION))} or newer, installed is "
            f"{'.'.join(map(str, version))}: upgrade it, or {instead}"
        )


def _transformer_engine_version() -> tuple[int, int] | None:
    """Its first two numbers; None when it is not installed."""
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None, f"Transformer Engine calls itself {version}"
    return int(numbers[1]), int(numbers[2])
