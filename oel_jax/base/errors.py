"""Errors that a user can act on."""


class UserError(ValueError):
    """A problem with the user's input: a config field, a file, a model directory.

    The message names the field or the file and says what to do. `main` prints the message alone,
    without a traceback, and exits with `status`.
    """

    status = 2  # a mistake that has to be mended first
    heading = "error"  # what the console writes in front of the message


class TryAgain(UserError):
    """What may be well without a change when the same command is run again later."""

    status = 75  # as after a notice to stop, see oel_jax/base/preemption.py


class NeedsReview(UserError):
    """A run has done all that it may do before a person has approved its knowledge texts."""

    status = 76
    heading = "waiting for review"
