"""Models behind an API: priced requests to servers that may fail or throttle."""

from stepladder.ask.remote.client import ask_remote
from stepladder.ask.remote.listener import Listener
from stepladder.ask.remote.teacher import RemoteModel

__all__ = ["Listener", "RemoteModel", "ask_remote"]
