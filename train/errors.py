"""The one exception whose message is written for the user."""


class UserError(ValueError):
    """Bad input: the message names the field, its value and the remedy.

    Entry points print it without a traceback and exit with ``BAD_INPUT``.
    """


def not_installed(setting: str, package: str) -> str:
    """Return the message for a setting whose package is not here, as the index calls it. Pure."""
    return f"{setting} needs the package {package}, which is not installed; `pip install {package}`"


class Diverged(FloatingPointError):
    """Training cannot continue from where it has come to; the message is written for the user.

    Entry points print it without a traceback and exit with ``FAILED``.
    """


class Hang(RuntimeError):
    """Ranks stand still: the message says which one is waited for, and where it is.

    Entry points exit with ``RESUMABLE``: nothing of the run itself need be wrong.
    """


# Exit codes that scripts rely on (0 is success).
FAILED = 1
BAD_INPUT = 2
RESUMABLE = 75
INTERRUPTED = 130
"""By Ctrl-C, where no rank was there to save: 128 + SIGINT, as shells have it. A launcher whose
ranks did not come to say where they stopped returns 128 + the signal that it was sent, too."""
