"""Token sources: text, the standard library and random tokens; the held-out split; batches for every layout.

Read in this order: `settings`, `sources` (which files, which side), `tokens` (tokenize once), `dataset` (batches),
`build` (all together).
"""

from megaqad.data.build import Datasets, build_datasets, prepare_tokens
from megaqad.data.dataset import Batch, TokenDataset
from megaqad.data.settings import DataSettings

__all__ = ["Batch", "DataSettings", "Datasets", "TokenDataset", "build_datasets", "prepare_tokens"]
