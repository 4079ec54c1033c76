"""How any model is asked, teacher or student: pay, persist, parse.

``ask_remote`` asks models behind an API, ``ask_embedded`` weights in this process. Both send
only what the ledger cannot answer, and store every answer in it.
"""

from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.local import Local, ask_embedded
from stepladder.ask.remote import Listener, RemoteModel, ask_remote
from stepladder.ask.request import Request, Response

__all__ = ["Ledger", "Listener", "Local", "RemoteModel", "Request", "Response", "Scope", "ask_embedded", "ask_remote"]
