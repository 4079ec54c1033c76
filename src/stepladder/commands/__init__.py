"""The commands of the command line, one module each; ``cli`` declares their arguments."""
