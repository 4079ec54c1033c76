"""Weights in 4 bits, and the proof of what that cost."""
