"""What cannot be computed is refused in one line that says which argument, and the way out."""

import pytest
import torch

from megaqad.losses import linear_cross_entropy, linear_kl, vocab_parallel_kl

LOGITS = torch.zeros(4, 10)
HIDDEN, HEAD, WEIGHTS = torch.zeros(4, 8), torch.zeros(10, 8), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS, torch.zeros(4, 11)), {}, "same padded vocabulary"),
        ((LOGITS.unsqueeze(0), LOGITS.unsqueeze(0)), {}, "flatten leading dimensions"),
        ((LOGITS.long(), LOGITS), {}, "floating point, not torch.int64"),
        ((LOGITS, LOGITS), {"temperature": 0.0}, "temperature=0.0"),
        ((LOGITS, LOGITS), {"temperature": float("nan")}, "temperature=nan"),
        ((LOGITS, LOGITS), {"token_mask": torch.ones(4)}, "token_mask is torch.float32"),
        (
            (LOGITS, LOGITS),
            {"impl": "magic"},
            "impl='magic' does not exist; choose one of auto, reference, torch, native, triton",
        ),
    ],
)
def test_vocab_parallel_kl_refuses(arguments, options, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        vocab_parallel_kl(*arguments, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((HIDDEN, HEAD, HIDDEN, torch.zeros(9, 8)), {}, "student head has 10 vocabulary rows on this rank"),
        ((HIDDEN, torch.zeros(10, 7), HIDDEN, HEAD), {}, "student hidden states (4, 8) and head (10, 7)"),
        ((HIDDEN, HEAD, torch.zeros(3, 8), HEAD), {}, "teacher hidden states hold 3 tokens"),
        ((HIDDEN.half(), HEAD.half(), HIDDEN, HEAD), {}, "torch.float16; use float32 or bfloat16"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"token_weights": torch.ones(4, 1)}, "token_weights has shape (4, 1)"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"temperature": -1.0}, "temperature=-1.0"),
        ((HIDDEN, HEAD, HIDDEN, HEAD), {"accumulate_into": HEAD.bfloat16()}, "must be float32 (10, 8)"),
    ],
)
def test_linear_kl_refuses(arguments, options, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        linear_kl(*arguments, **{"token_weights": WEIGHTS} | options)
    assert message in str(caught.value)


def test_linear_cross_entropy_refuses_labels_of_another_length() -> None:
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(HIDDEN, HEAD, torch.zeros(3, dtype=torch.int64), token_weights=WEIGHTS)
