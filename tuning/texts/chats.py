"""Chats as rows hold them, and as the model's chat template writes them."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_afbs.errors import InputError, one_line

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names of roles, where OpenAI's differ."""
_OWN_KEYS = ("role", "from", "content", "value")

TokenizerLoader = Callable[[], Any]
"""Gives the model's tokenizer; called only if there are chats."""


class RefusedChatError(ValueError):
    """The model's template does not take this chat."""


class ChatTemplate:
    """A model's chat template.

    Args:
        load_tokenizer: Gives the model's tokenizer; None where there is no model.

    Raises:
        InputError: The model has no template.
    """

    def __init__(self, load_tokenizer: TokenizerLoader | None) -> None:
        self._tokenizer: Any = None if load_tokenizer is None else load_tokenizer()
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise InputError(
                "chats expect a model with a chat template, this one has none: give plain text "
                "or a column of text"
            )

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A chat's text, without the token that begins a whole prompt.

        Raises:
            RefusedChatError: The template does not take it.
        """
        tokenizer = self._tokenizer
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program, and may fail in any way
            raise RefusedChatError(one_line(error)) from None
        # Windows begin with that token (``windows.first_tokens``), and chats stand inside them.
        return text.removeprefix(tokenizer.bos_token or "")


def as_messages(value: Any) -> list[dict[str, Any]]:
    """A chat with OpenAI's keys (``role``, ``content``) from theirs or ShareGPT's.

    Args:
        value: A list of messages, or, as older data sets are saved, one list for each key.

    Raises:
        ValueError: It is no chat; the message names the field.
    """
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        columns = zip(*value.values(), strict=True)
        value = [dict(zip(value, message, strict=True)) for message in columns]
    if not isinstance(value, list):
        raise ValueError(f"text or chat messages expected, got {type(value).__name__}")
    return [_message(index, message) for index, message in enumerate(value)]


def is_empty(messages: list[dict[str, Any]]) -> bool:
    """Whether nobody says or calls anything."""
    return not any(message["content"].strip() or "tool_calls" in message for message in messages)


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {index}: an object expected, got {type(message).__name__}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise ValueError(
            f"message {index}: a text 'role' or 'from' expected, found {', '.join(message)}"
        )
    if "content" not in message and "value" not in message and "tool_calls" not in message:
        raise ValueError(f"message {index}: 'content' or 'value' expected")
    content = _content(index, message.get("content", message.get("value")))
    others = {
        key: part for key, part in message.items() if key not in _OWN_KEYS and part is not None
    }
    return {"role": _ROLES.get(role, role), "content": content, **others}


def _content(index: int, content: Any) -> str:
    """The text of a message, which may be given in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"message {index}: content: text expected, got {type(content).__name__}")
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"message {index}: content: parts of type 'text' expected")
    return "".join(texts)
