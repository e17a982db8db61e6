"""``megaqad logits``: token ids through the teacher or the student, in ``logits.npy``."""

import numpy as np

from megaqad.config import Settings
from megaqad.data import read_token_file
from megaqad.recovery.logits import gathered_logits
from megaqad.recovery.session import Session
from megaqad.recovery.students import load_student


def logits(settings: Settings) -> None:
    """Every rank's part of the command: write ``output_dir/logits.npy``, float32 [b, s, V]."""
    session = Session.start(settings)
    tokens = read_token_file(settings.tokens, session.architecture.vocab_size)
    student = load_student(session)
    values = gathered_logits(session, student, tokens)
    if session.ranks.is_main:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        assert values is not None
        np.save(settings.run_dir / "logits.npy", values.numpy())
    session.terminal.say(f"wrote {settings.run_dir / 'logits.npy'}")
