"""Servers of one's own: started, watched, and gone when the run is."""
