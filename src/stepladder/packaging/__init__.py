"""A finished run as a folder that answers anywhere, without a network: ``stepladder pack``."""
