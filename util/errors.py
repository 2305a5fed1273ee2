"""Exceptions that entry scripts turn into one line of output and an exit status."""

import unicodedata

MAX_LINE = 2000  # characters of a message
# Control characters, halves of surrogate pairs, line separators, and marks that change the direction of the text.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp", "Cf")
_JOINERS = "\u200c\u200d"  # are of category Cf and belong to Arabic and Indian words


def one_line(text: str) -> str:
    """Return a message as one line of at most MAX_LINE characters that is safe to print.

    A message quotes names and values of files, which may contain anything. An error of a dataloader worker contains
    its traceback as text, of which the last line is the message.
    """
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2 - 5]} ... {text[5 - MAX_LINE // 2 :]}"
    if text.isprintable():
        return text
    return "".join(map(_escape, text))


def _escape(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode()


class UserError(Exception):
    """An error that the user can fix.

    Args:
        message: the file or flag, the value and the remedy; shown as one line.
        hint: more lines, such as commands to copy. They are shown as they are: nothing from a file belongs there.
    """

    def __init__(self, message: object = "", hint: str = "") -> None:
        super().__init__(message, hint)

    def __str__(self) -> str:
        message, hint = self.args
        return "\n".join([one_line(str(message)), *([hint] if hint else [])])


class DiskError(UserError):
    """The disk or its network file system failed. That says nothing about the content of its files."""


class LostProcess(UserError):
    """A collective failed, since another process died or did not come; the message names rank and collective."""


class NonFinite(ArithmeticError):
    """A prediction or a loss is NaN or infinite; the message names it."""


class NonFiniteLoss(NonFinite):
    """Too many steps in a row had a NaN or infinite loss or gradient; the message names losses and images."""


class StopRequested(Exception):
    """The process was asked to stop (a signal, or --stop_after_minutes); the message says where the run was saved."""
