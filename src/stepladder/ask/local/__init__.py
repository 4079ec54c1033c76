"""Weights in this process, asked in batches at price 0."""

from stepladder.ask.local.embedded import ask_embedded
from stepladder.ask.local.engine import ROWS, Local

__all__ = ["ROWS", "Local", "ask_embedded"]
