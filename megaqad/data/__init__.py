"""Token sources: text, the standard library and random tokens; the held-out split; batches for every layout.

Read in this order: `settings`, `sources` (which files, which side), `tokens` (tokenize once), `dataset` (batches),
`build` (all together). `token_file` reads what a user tokenized.
"""

from megaqad.data.build import Datasets, build_datasets, prepare_tokens
from megaqad.data.dataset import Batch, TokenDataset
from megaqad.data.settings import DataSettings
from megaqad.data.token_file import read_token_file

__all__ = ["Batch", "DataSettings", "Datasets", "TokenDataset", "build_datasets", "prepare_tokens", "read_token_file"]
