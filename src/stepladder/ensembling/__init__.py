"""How several members' answers become one, and whether that is worth it."""
