"""What a user says about data: where the text is, what is held out, and how much of it to use.

`data=<file.txt>`, a directory or a glob sets `source=text` and `files`; `data=stdlib` and `data=random` name the two
sources that need no files at all.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from megaqad.errors import UserError

Source = Literal["text", "stdlib", "random"]


@dataclass(frozen=True)
class DataSettings:
    """Settings under `data.`; every field explains itself below its name."""

    source: str = "text"
    """`text` reads `files`; `stdlib` reads the source code of Python's standard library, which every machine has;
    `random` draws uniform random tokens, with which distillation still works, only less well."""

    files: list[str] = field(default_factory=list)
    """Training text for `source=text`: UTF-8 files, directories (their .txt, .md, .rst, .py, .jsonl, .ndjson and
    .json files, at any depth; what is left out is said) and globs. A JSON record, on a line or in an array, is one
    document, its text under the key "text"."""

    validation_files: list[str] = field(default_factory=list)
    """Held-out text, given in the same way. Empty: a hash of each file's name holds out about 5 % of the files, or,
    with fewer than 20 files, the last 5 % of every file is held out. With `source=random` too."""

    max_train_tokens: int = 0
    """Use only the first so many training tokens. 0: all there are (for `random`: 1,048,576)."""

    max_validation_tokens: int = 0
    """Evaluate on at most so many held-out tokens. 0: all there are (for `random`: 65,536)."""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise UserError(f"data.source={self.source} is unknown: choose one of {', '.join(get_args(Source))}")
        if self.source != "text" and self.files:
            raise UserError(f"data.files has no effect with data.source={self.source}: set data.source=text or drop it")
        for name, value in (("train", self.max_train_tokens), ("validation", self.max_validation_tokens)):
            if value < 0:
                raise UserError(f"data.max_{name}_tokens={value} is negative: use 0 for all tokens")
