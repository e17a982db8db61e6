"""Every random number generator of a rank as tensors: PyTorch's, the GPU's, Megatron-Core's, Python's and NumPy's.

Nothing that megaqad does itself draws a random number while it trains; a model with dropout, a recipe with stochastic
rounding or a user's own data code may. Their states belong to one rank of one layout and cannot be divided otherwise,
so another layout starts from its seed again. No state is a pickle: Python's and NumPy's are JSON in a byte tensor.
"""

import json
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

TRACKER = "tracker."


def rng_state() -> dict[str, Tensor]:
    """Name -> state, on the CPU; each of one dim."""
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": _json_tensor(random.getstate()),
        "numpy": _json_tensor([name, np.asarray(words).tolist(), position, has_gauss, cached]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for tracked, state in get_cuda_rng_tracker().get_states().items():
        states[TRACKER + tracked] = state.cpu().clone()
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Put all generators back to where ``rng_state`` found them."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = _from_json_tensor(states["python"])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(_from_json_tensor(states["numpy"])))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    tracked = {name.removeprefix(TRACKER): state for name, state in states.items() if name.startswith(TRACKER)}
    tracker.set_states({**tracker.get_states(), **tracked})


def _json_tensor(content: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _from_json_tensor(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
