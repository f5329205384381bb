"""The one kind of error that a user can mend: the command line prints it in a line, anything else is a bug."""


class MekdError(Exception):
    """What a user can mend: the message says what was wrong and what to do; status is the exit status."""

    status = 2


class UsageError(MekdError, ValueError):
    """A setting or an argument is not what it may be."""


class Diverged(MekdError, RuntimeError):
    """A loss, a weight or a generated image is NaN or infinite; the last good checkpoint is kept."""
