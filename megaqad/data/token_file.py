"""Token ids that a user gives as they are, in a .npy file."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaqad.errors import UserError


def read_token_file(path: str | None, vocab_size: int) -> Tensor:
    """int64 [b, s] from a .npy file.

    Raises:
        UserError: no file, not integers, not two-dimensional, or ids outside the vocabulary.
    """
    if path is None:
        raise UserError("tokens is not set: give tokens=<file.npy> with int64 token ids [b, s]")
    if not Path(path).is_file():
        raise UserError(f"tokens={path} does not exist: give a .npy file with int64 token ids [b, s]")
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(
            f"tokens={path} is no .npy file of numbers ({error}): save int64 ids with numpy.save"
        ) from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or array.size == 0:
        raise UserError(f"tokens={path} has shape {array.shape} and dtype {array.dtype}: give int64 ids [b, s]")
    if array.min() < 0 or array.max() >= vocab_size:
        raise UserError(
            f"tokens={path} holds ids from {array.min()} to {array.max()}: the vocabulary has 0 to {vocab_size - 1}"
        )
    return torch.from_numpy(array.astype(np.int64))
