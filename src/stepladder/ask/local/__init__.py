"""Weights in this process, asked in batches at price 0."""

from stepladder.ask.local.embedded import ask_embedded
from stepladder.ask.local.engine import BATCH_SIZE, Local

__all__ = ["BATCH_SIZE", "Local", "ask_embedded"]
