"""The one exception for mistakes a user can mend: its text is the sentence the user reads."""


class DSDError(ValueError):
    """A user's mistake. The message is one sentence that names the file or flag and says what to do.

    Scripts print it without a traceback and leave with a non-zero status; library callers may catch it as a
    `ValueError`.
    """
