"""Exceptions that entry scripts turn into one line of output and an exit status."""


class UserError(Exception):
    """An error that the user can fix. The message is one line with the file or flag, the value and the remedy."""


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
