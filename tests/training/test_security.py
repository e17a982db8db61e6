"""What a run may read and write: no pickle, no code from a model's directory, no key of anybody's."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from megaqad import __file__ as package
from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.training.logs import MetricsLog

UNPICKLING = re.compile(
    r"torch\.load\(|\bimport (pickle|dill|cloudpickle|joblib|shelve)\b|from (pickle|dill|joblib) |allow_pickle=True"
    r"|weights_only=False|trust_remote_code=True|yaml\.(unsafe_)?load\(|\beval\(|\bexec\("
)
MODULE_CALLS = (".eval(",)
"""``model.eval()`` evaluates nothing."""
KEY = "0123456789abcdef0123456789abcdef01234567"


def offences(text: str) -> list[str]:
    found = [text[max(0, match.start() - 1) : match.end()] for match in UNPICKLING.finditer(text)]
    return [words for words in found if words not in MODULE_CALLS]


def test_the_package_unpickles_nothing():
    """No user's path can run code here: there is no call that could."""
    assert offences("x = torch.load(path, weights_only=False)")
    assert offences("import pickle")
    assert not offences("model.eval()")
    files = sorted(Path(package).parent.rglob("*.py"))
    assert len(files) > 50
    assert {str(path): found for path in files if (found := offences(path.read_text(encoding="utf-8")))} == {}


def test_a_wandb_key_is_written_nowhere(tmp_path, monkeypatch):
    """It comes from wandb's own login or the environment; neither settings nor logs nor wandb's files have it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = load_settings(["model=m", f"output_dir={tmp_path}", "data=random", "logging.wandb.mode=offline"])
    assert KEY not in repr(asdict(settings))
    log = MetricsLog(tmp_path, settings, is_main=True)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_key_is_no_setting(prefix):
    """Refused by name; the refusal does not repeat the key."""
    with pytest.raises(UserError, match="api_key") as refused:
        load_settings(["model=m", "output_dir=o", "data=random", f"{prefix}logging.wandb.api_key={KEY}"])
    assert KEY not in str(refused.value)
