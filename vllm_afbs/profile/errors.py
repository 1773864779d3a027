"""The error that refuses a profile."""

from vllm_afbs.files import printable

_MAX_MESSAGE = 1000


class ProfileError(ValueError):
    """A profile that must not be served; the message is one line for the user.

    Messages quote text from files, so they are escaped and shortened here.
    """

    def __init__(self, message: str) -> None:
        """Escapes the message and cuts it to 1000 characters."""
        line = printable(message[: _MAX_MESSAGE + 1])
        super().__init__(line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}...")
