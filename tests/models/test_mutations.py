"""A damaged checkpoint is read as it stands or refused in one line; ``mutations.py`` tries any number of them."""

from tests.models.mutations import check


def test_damaged_directories_are_read_as_they_stand_or_refused() -> None:
    seen = check(400)
    assert seen["read"] > 20
    assert seen["read, logits right"] > 10
    assert seen["refused"] > 200
