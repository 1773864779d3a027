"""What the tuner tells its user on one line."""

_LONGEST_MESSAGE = 600


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line for them."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut short where it lists every layer."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
