"""What a checkpoint is, read from its config.json and nothing else.

``describe_model`` turns the config.json of a supported family into one frozen record. It imports neither torch nor
transformers, so a command can refuse a bad request within milliseconds. Values that transformers leaves out of a
file because they equal the class default come from the family's table (``families.py``).

Rotary settings have two homes: transformers 5 writes ``rope_parameters``, older checkpoints ``rope_theta`` beside
``rope_scaling``. Both are read; anything but the plain and the Llama-3 form is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaqad.errors import UserError
from megaqad.models.families import FAMILIES, Family, family_of


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency-dependent stretching of the rotary wavelengths, as introduced with Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The architecture of one checkpoint; sizes are of the whole model, before any sharding."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None
    """Tokens a position sees in the layers with a sliding window; None when every layer sees all."""
    config: Mapping[str, Any]
    """config.json as it was read; exports write it back."""

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the names that the shape columns of the family tables use."""
        return {
            "hidden": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "ffn": self.ffn_hidden_size,
            "vocab": self.vocab_size,
            "head": self.head_dim,
        }

    @property
    def table(self) -> Family:
        """The family's rows."""
        return FAMILIES[self.family]


def describe_model(model_dir: Path) -> ModelDescription:
    """Read ``model_dir/config.json``.

    Raises:
        UserError: no such file, not JSON, an unsupported architecture, or a setting that would change the model's
            function and is not implemented (biases, activations, rotary forms, quantized weights).
    """
    config = _read_config(Path(model_dir))
    family = family_of(config, Path(model_dir))
    merged = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    _refuse_unsupported(merged, family, Path(model_dir))
    hidden_size = _positive(merged, "hidden_size", model_dir)
    num_heads = _positive(merged, "num_attention_heads", model_dir)
    num_kv_heads = _positive(merged, "num_key_value_heads", model_dir) if "num_key_value_heads" in merged else num_heads
    if num_heads % num_kv_heads:
        raise UserError(
            f"{model_dir}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}; "
            "grouped-query attention needs equal groups, correct config.json"
        )
    if "head_dim" not in merged and hidden_size % num_heads:
        raise UserError(
            f"{model_dir}: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads} and "
            "config.json has no head_dim; add head_dim"
        )
    theta, scaling = _rope(merged, model_dir)
    return ModelDescription(
        family=family.name,
        hidden_size=hidden_size,
        num_layers=_positive(merged, "num_hidden_layers", model_dir),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_positive(merged, "head_dim", model_dir) if "head_dim" in merged else hidden_size // num_heads,
        ffn_hidden_size=_positive(merged, "intermediate_size", model_dir),
        vocab_size=_positive(merged, "vocab_size", model_dir),
        tied_embeddings=bool(merged["tie_word_embeddings"]),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=float(merged["rms_norm_eps"]),
        max_position_embeddings=_positive(merged, "max_position_embeddings", model_dir),
        sliding_window=_sliding_window(config, merged),
        config=config,
    )


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; model must be a directory with a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from the original checkpoint") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object; restore it from the original checkpoint")
    return config


def _positive(config: Mapping[str, Any], key: str, model_dir: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{model_dir}: config.json has {key}={value!r}; it must be a positive integer")
    return value


def _refuse_unsupported(config: Mapping[str, Any], family: Family, model_dir: Path) -> None:
    """Settings under which the same tensors would mean another function than the one built here."""
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{model_dir}: config.json has {key}={config[key]!r}, {family.architecture} is supported with "
                f"{key}={value!r} only; choose another model"
            )
    if "quantization_config" in config:
        method = config["quantization_config"]
        name = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise UserError(
            f"{model_dir}: the checkpoint is already quantized (quant_method={name!r}); "
            "give the BF16 checkpoint it was made from"
        )


def _rope(config: Mapping[str, Any], model_dir: Path) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either of the two places they are written to."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{model_dir}: config.json has rope settings {settings!r}; they must be an object")
    theta = float(settings.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = settings.get("rope_type", settings.get("type", "default"))
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{model_dir}: partial_rotary_factor={partial} is not supported, only 1.0; take another model")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{model_dir}: rope type {kind!r} is not supported, only 'default' and 'llama3'; choose another model"
        )
    missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in settings]
    if missing:
        raise UserError(f"{model_dir}: llama3 rope scaling lacks {', '.join(missing)}; restore the original file")
    return theta, Llama3RopeScaling(
        factor=float(settings["factor"]),
        low_freq_factor=float(settings["low_freq_factor"]),
        high_freq_factor=float(settings["high_freq_factor"]),
        original_max_position_embeddings=int(
            settings.get("original_max_position_embeddings", config["max_position_embeddings"])
        ),
    )


def _sliding_window(config: Mapping[str, Any], merged: Mapping[str, Any]) -> int | None:
    """The window of the layers that have one.

    An explicit null means no window, while a missing key means the class default. Qwen switches it by
    ``use_sliding_window`` and by layer.
    """
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    if not merged.get("use_sliding_window", True) or "sliding_window" not in merged:
        return None
    layer_types = merged.get("layer_types")
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    if layer_types is None and merged.get("max_window_layers", 0) >= merged["num_hidden_layers"]:
        return None
    return int(merged["sliding_window"])
