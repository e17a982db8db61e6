"""safetensors files that are read in parts.

safetensors maps a file, and what was read of the map counts as this process's memory until the map is given up. A
reader that keeps its files open so holds, besides the tensors that it fills, all that it ever read of them.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open

MAPPED_MOST = 128 << 20
"""Bytes read before all files are closed; they are opened again as they are wanted."""


class MappedFiles:
    """Files by path, opened when first wanted. Errors: those of ``safe_open``."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._read = 0

    def file(self, path: Path, size: int) -> Any:
        """The file, to read about ``size`` bytes of it now; not to be kept."""
        if self._read + size > MAPPED_MOST:
            self.close()
        self._read += size
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def close(self) -> None:
        self._open.clear()
        self._read = 0
