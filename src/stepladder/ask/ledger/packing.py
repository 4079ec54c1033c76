"""Compression of what the ledger keeps and seldom reads: requests, and responses as they came."""

from __future__ import annotations

import zlib

LEVEL = 1
"""Of zlib: half the size of a short answer in some 20 microseconds; higher levels save a few percent more."""
MAX_BYTES = 2**28
"""Of what is unpacked: more than any reply may have (``Request.reply_bound``)."""


def packed(content: bytes) -> bytes:
    return zlib.compress(content, LEVEL)


def unpacked(content: bytes | str) -> bytes:
    """What was packed; older versions stored identities as they are, as text.

    Raises:
        zlib.error: it is not what was stored.
    """
    return content.encode() if isinstance(content, str) else zlib.decompressobj().decompress(content, MAX_BYTES)
