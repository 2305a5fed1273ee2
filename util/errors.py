"""The exceptions that entry scripts turn into one line and an exit status."""


class UserError(Exception):
    """Something that the user can mend: one line with the file or flag, the value and the remedy. Entry scripts print
    it and exit.
    """


class NonFinite(ArithmeticError):
    """A prediction or a loss is NaN or infinite; the message names where."""


class StopRequested(Exception):
    """The process was asked to stop (SIGTERM, SIGINT); the message says where the run was saved."""
