"""Errors that a user can act on."""


class UserError(ValueError):
    """A problem with the user's input: a config field, a file, a model directory.

    The message names the field or the file and says what to do. `main` prints the message alone,
    without a traceback, and exits with status 2.
    """
