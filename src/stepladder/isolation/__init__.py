"""What a stranger wrote and this package must run, kept apart: processes that can do nothing but compute."""
