"""How several members' answers become one, and whether that beats the best member alone."""
