"""Train the demo's tokenizer: `python examples/train_tokenizer.py <folder>`.

Byte-level BPE with 2,048 entries on the training side of the standard library's source. Byte level means that all 256
bytes are entries, so every text can be encoded and comes back unchanged, without an unknown token. 2,048 is small
enough that the demo model's two embedding tables stay under a megabyte each and large enough that the vocabulary can
be sharded unevenly and that a common Python word is one token.

The result is shipped, so nobody needs to run this; it is here to show where the shipped files come from.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megaqad.data.settings import DataSettings
from megaqad.data.sources import split_files

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"

# GPT-2's pattern with three changes for source code: a run of spaces stays whole except for its last (so indentation
# is one token and the space goes with the word), newlines are their own pieces, digits come in threes at most.
PIECES = r"""[^\S\r\n]?\p{L}+|\p{N}{1,3}|[^\S\r\n]?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?=[^\S\r\n]\S)|\s+"""


def train_tokenizer(output_dir: Path) -> Tokenizer:
    """Train on the standard library's training files and write tokenizer.json and tokenizer_config.json.

    Errors: `UserError` when the library's sources are missing.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = split_files(DataSettings(source="stdlib")).train
    tokenizer.train_from_iterator((text for file in files for text in file.documents()), trainer)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (output_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


if __name__ == "__main__":
    print(train_tokenizer(Path(sys.argv[1])).get_vocab_size(), "entries")
