"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """Wrong usage or bad input.

    The message is one line that names the file, key or option, the value found there, and the way out. The command line
    prints it without a traceback and exits with code 2.
    """
