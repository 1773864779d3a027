"""The text of rows: which column is read, and which rows are skipped."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_afbs.errors import InputError
from vllm_afbs.files import printable
from vllm_afbs.tuning.texts.chats import (
    ChatTemplate,
    RefusedChatError,
    TokenizerLoader,
    as_messages,
    is_empty,
)
from vllm_afbs.tuning.texts.spread import BYTES_PER_ROW, Budget

TEXT_COLUMN = "text"
CHAT_COLUMNS = ("messages", "conversations")
COLUMN_OPTION = "--calibration-column (of evaluate: --text-column)"
_MAX_LISTED = 200


@dataclass(frozen=True)
class Row:
    """A row as it was read.

    Attributes:
        where: Its file and place, for messages.
        columns: Value by column; checked by ``RowTexts``.
    """

    where: str
    columns: Any


class RowTexts:
    """Takes the text out of rows.

    Args:
        column: Which column to read; None for a column of text or of chats by its usual name.
        load_tokenizer: Gives the model's tokenizer, whose template chats go through.

    Attributes:
        column: The column that is read; None as long as no row was.
        num_rows: How many rows were read, those that were skipped not counted.
    """

    def __init__(self, column: str | None, load_tokenizer: TokenizerLoader | None) -> None:
        self.column = column
        self._load_tokenizer = load_tokenizer
        self._template: ChatTemplate | None = None
        self._first_refusal = ""
        self.num_rows = 0
        self._skipped: Counter[str] = Counter()

    def of(self, rows: Iterable[Row], budget: Budget) -> Iterator[str]:
        """The rows' texts, until the budget is spent.

        Raises:
            InputError: A row has no such column, or something else than text or a chat in it.
        """
        for row in rows:
            budget.num_bytes -= BYTES_PER_ROW
            if (text := self._text(row)) is not None:
                budget.characters -= len(text)
                self.num_rows += 1
                yield text
            if budget.spent:
                return

    def choose(self, names: Iterable[str], where: str) -> str:
        """The column to read: what the user names, else the first usual one that there is.

        Args:
            names: Of the columns that a row has.
            where: The row or its file, for messages.

        Raises:
            InputError: It is not among them.
        """
        names = list(names)
        if self.column is None:
            usual = (TEXT_COLUMN, *CHAT_COLUMNS)
            self.column = next((name for name in usual if name in names), None)
        if self.column is not None and self.column in names:
            return self.column
        if self.column is None:
            expected = "a column 'text', 'messages' or 'conversations' expected"
        else:
            expected = f"a column {self.column!r} expected"
        found = ", ".join(map(str, names))
        if len(found) > _MAX_LISTED:
            found = f"{found[:_MAX_LISTED]}..."
        raise InputError(
            f"{where}: {expected}, found {found}; {COLUMN_OPTION} names the one to read"
        )

    def summary(self) -> str:
        """How many rows of which column were read and skipped, and why."""
        through = ", through the chat template" if self._template is not None else ""
        column = "" if self.column is None else f" of {printable(self.column)!r}"
        skipped = ", ".join(f"{count} {why}" for why, count in self._skipped.items())
        if self._first_refusal:
            skipped += f" (the first: {self._first_refusal})"
        read = f"{self.num_rows} row{'s' if self.num_rows != 1 else ''}{column}{through}"
        return read + (f"; skipped: {skipped}" if skipped else "")

    def _text(self, row: Row) -> str | None:
        if not isinstance(row.columns, Mapping):
            kind = type(row.columns).__name__
            raise InputError(f"{row.where}: a JSON object with columns expected, got {kind}")
        column = self.choose(row.columns, row.where) if row.columns else None
        value = None if column is None else row.columns[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            self._skipped["empty"] += 1
            return None
        if isinstance(value, str) and column not in CHAT_COLUMNS:
            return _valid_unicode(value)
        return self._chat(f"{row.where}: {column}", value)

    def _chat(self, where: str, value: Any) -> str | None:
        if isinstance(value, str):
            raise InputError(f"{where}: chat messages expected, got text")
        try:
            messages = as_messages(value)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        text = "" if is_empty(messages) else self._render(where, messages)
        if text is not None and not text.strip():
            self._skipped["empty"] += 1
            return None
        return text

    def _render(self, where: str, messages: list[dict[str, Any]]) -> str | None:
        try:
            if self._template is None:
                self._template = ChatTemplate(self._load_tokenizer)
            return _valid_unicode(self._template.render(messages))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except RefusedChatError as error:
            self._first_refusal = self._first_refusal or printable(str(error))[:_MAX_LISTED]
            self._skipped["that the chat template refuses"] += 1
            return None


def _valid_unicode(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can spell, replaced as browsers do."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
