"""Compression of what the ledger keeps. SQLite puts longer rows on pages of their own, of which most stays empty."""

from __future__ import annotations

import zlib

LEVEL = 1
"""Of zlib: half the size of a short answer in some 20 microseconds; higher levels save a few percent more."""
LEAST_CHARACTERS = 256
"""Shorter texts stay as they are."""
MAX_BYTES = 2**28
"""Of what is unpacked: more than any reply may have (``Request.reply_bound``)."""


def packed(content: bytes) -> bytes:
    return zlib.compress(content, LEVEL)


def unpacked(content: bytes) -> bytes:
    """What was packed.

    Raises:
        zlib.error: it is not what was stored.
    """
    decompressor = zlib.decompressobj()
    found = decompressor.decompress(content, MAX_BYTES)
    if not decompressor.eof:
        raise zlib.error("ends before its data does, or is too long")
    return found


def packed_text(text: str) -> str | bytes:
    """A text as it is stored: a short one, and those of older versions, as it is."""
    return text if len(text) < LEAST_CHARACTERS else packed(text.encode())


def unpacked_text(stored: str | bytes) -> str:
    """A text that was stored.

    Raises:
        zlib.error, UnicodeDecodeError: it is not what was stored.
    """
    return stored if isinstance(stored, str) else unpacked(stored).decode()
