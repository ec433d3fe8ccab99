"""What a row of a file can be: a document in a block of them, or a reject with its reason."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

Reason = Literal[
    "malformed JSON",
    "not an object",
    "no text field",
    "text is not a string",
    "empty text",
    "invalid unicode",  # lone surrogates: JSON can spell them, UTF-8 and the tokenizers cannot
    "invalid UTF-8",
    "too long",
]

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How documents are read.

    Attributes:
        text_field: field or column of the text.
        metadata_fields: fields or columns kept beside the text, as text.
        on_bad_input: skip and count what cannot be used, or raise at the first of it.
        keep_empty: whether documents of no text, or of white space only, are kept.
        max_document_bytes: longer lines and texts are dropped.
        max_expansion: decompressed bytes for a compressed one, beyond which a large stream is taken for a bomb.
    """

    text_field: str = "text"
    metadata_fields: tuple[str, ...] = ("url", "timestamp", "source")
    on_bad_input: Literal["skip", "fail"] = "skip"
    keep_empty: bool = False
    max_document_bytes: int = 8 << 20
    max_expansion: int = 200


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: its line (row in Parquet), from 1 at the part's first; why; and how it begins."""

    line: int
    reason: Reason
    excerpt: str


@dataclass(slots=True)
class Block:
    """Documents in order: their texts, a list of values for each metadata field, and what was dropped between them."""

    texts: list[str]
    metadata: list[list[str | None]]
    dropped: Counter[Reason] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bad:
    """Stands where a row's text would be."""

    reason: Reason
    excerpt: str = ""


def as_texts(values: list[Any]) -> list[str | None]:
    """Metadata values as text."""
    if set(map(type, values)) <= {str, type(None)}:
        try:
            "".join(filter(None, values)).encode()
        except UnicodeEncodeError:  # lone surrogates
            pass
        else:
            return values
    return [value if value is None or (type(value) is str and value.isascii()) else _as_text(value) for value in values]


def _as_text(value: object) -> str | None:
    """A metadata value; numbers and nested ones as JSON spells them."""
    if value is msgspec.UNSET:
        return None
    if not isinstance(value, str):
        try:
            is_json = isinstance(value, bool | int | float | list | dict)
            value = json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)
        except RecursionError:  # nested as deep as could just be read
            return None
    return value.encode(errors="replace").decode()  # lone surrogates cannot be written anywhere
