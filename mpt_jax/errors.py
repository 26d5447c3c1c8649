"""The one exception that a user may see."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence with what is wrong, the value, the key or file, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
