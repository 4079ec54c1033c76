"""A smoke run of what only a card can show (``stepladder doctor --card``), written to a file to send back."""
