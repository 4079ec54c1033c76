"""``stepladder view``: a run in a browser, and the queue of labels to be decided.

It reads a run's folder and ledger, and writes one thing: decisions, into the file that ``[questions] reviewed`` names.
guard.py lets nobody else in; index.py finds what a page shows; decided.py keeps decisions; app.py has a function for
each page, whose text is in templates/ and words.py.
"""
