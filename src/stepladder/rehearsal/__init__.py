"""Rehearsals: what a run would do on cards, done on fake tensors, which have shapes and no memory."""
