"""Stepladder: a few hundred labelled questions in, a small reasoning model that is proved to work out."""

__version__ = "0.1.0"
