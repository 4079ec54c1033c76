"""Closed-world multiple-choice problems whose answers clingo proves.

world.py     what a problem is: a logic program, its words, what is asked, the mistakes that give wrong options
words.py     the glossary: ASCII ids in programs, words in texts
prove.py     the clingo side: a program proves one option or is refused
derive.py    why an atom holds or fails, read off the solver's own rule instances
chaining.py, ordering.py, table.py, arithmetic.py     one family each
generate.py  seed -> records
"""

from stepladder.closedworld.generate import FAMILIES, SPLITS, generate, to_line
from stepladder.closedworld.prove import Unproved, prove, prove_untrusted

__all__ = ["FAMILIES", "SPLITS", "Unproved", "generate", "prove", "prove_untrusted", "to_line"]
