"""How questions are answered by models: one at a time, up a cascade, by vote, by a finished model or a team of them."""
