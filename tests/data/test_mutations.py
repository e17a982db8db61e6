"""A damaged data file gives the tokens of its text or is refused in one line; ``mutations.py`` tries any number."""

from tests.data.mutations import check


def test_damaged_files_give_their_text_or_are_refused() -> None:
    seen = check(300)
    assert seen["read"] > 60
    assert seen["refused"] > 80
