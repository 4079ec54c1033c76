"""Base URLs: the address of a server, and nothing that is secret or goes elsewhere; and ids of models and datasets on
hubs."""

from __future__ import annotations

import re
import urllib.parse

EXAMPLE = "write one such as http://127.0.0.1:8000/v1"
HUB_ID = re.compile(r"(modelscope:)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
"""``[modelscope:]OWNER/NAME[@REVISION]``."""


def address_problem(url: str) -> str | None:
    """What is wrong with a base URL, and what to do; None if nothing is. What the message shows is no secret."""
    if not url.isprintable() or " " in url or not url.startswith(("http://", "https://")):
        return f"is no base URL; {EXAMPLE}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return f"is no base URL; {EXAMPLE}"
    if "@" in parts.netloc:
        return "holds a user name or password; leave it out, and name the environment variable of the key (api_key_env)"
    if not host:
        return f"names no server; {EXAMPLE}"
    if parts.query or parts.fragment:
        return "goes on after the path ('?' or '#'); end it with the path, such as /v1"
    return None


def without_password(text: str) -> str:
    """A base URL as a message may show it."""
    scheme, separator, rest = text.partition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if separator and "@" in rest else text
