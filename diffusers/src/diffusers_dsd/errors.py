"""The one exception for mistakes a user can mend: its text is the sentence the user reads."""


class DSDError(ValueError):
    """A user's mistake. The message is one sentence that names the file or flag and says what to do.

    Scripts print it without a traceback and leave with a non-zero status; library callers may catch it as a
    `ValueError`.
    """


class ItemError(DSDError):
    """One item of a benchmark cannot be scored: a picture or row cannot be read, or its score is not a number.

    Args:
        message: as of `DSDError`.
        item_id: whose mistake it is, where that is known.
    """

    def __init__(self, message: str, item_id: str | None = None) -> None:
        super().__init__(message)
        self.item_id = item_id


def first_line(error: Exception) -> str:
    """What another library said, short enough for a sentence: its first line, without the full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
