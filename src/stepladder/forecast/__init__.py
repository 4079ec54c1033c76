"""What a run will cost, take and need, before it does: arithmetic, and tables of it."""
