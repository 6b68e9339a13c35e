"""The error meant for a person; apart from the rest, so that whoever refuses something need not wait for torch."""


class UserError(ValueError):
    """What was wrong, with the value, and what to do.

    The command line prints it without a traceback and exits with status 1.
    """
