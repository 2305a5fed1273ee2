"""Messages of errors are one line, whatever a file has in its names and values."""

import pickle

import pytest

from util.errors import MAX_LINE, UserError, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.json: 'two\nlines\r'", r"a.json: 'two\nlines\r'"),
        ("\x1b[2Jcleared", r"\x1b[2Jcleared"),  # a terminal would obey
        ("\u202egpj.exe", r"\u202egpj.exe"),  # shown from right to left
        ("half \ud800", r"half \ud800"),
        (
            "Bild\u00a01 \u5b89 \u0915\u094d\u200d\u0937",
            "Bild\u00a01 \u5b89 \u0915\u094d\u200d\u0937",
        ),
    ],
)
def test_messages_are_one_line(text: str, shown: str) -> None:
    assert str(UserError(text)) == shown
    assert str(pickle.loads(pickle.dumps(UserError(text)))) == shown  # from a dataloader worker


def test_long_messages_lose_their_middle() -> None:
    text = "begin " + "x" * 9000 + " end"
    shown = str(UserError(text))
    assert MAX_LINE - 10 < len(shown) <= MAX_LINE
    assert shown.startswith("begin xx")
    assert shown.endswith("xx end")
    assert " ... " in shown


def test_an_error_of_a_worker_keeps_its_message() -> None:
    trace = "Caught UserError in worker 0.\nTraceback (most recent call last):\n  File 'a'\n"
    assert one_line(trace + "util.errors.UserError: a.jpg: damaged\n") == "a.jpg: damaged"
