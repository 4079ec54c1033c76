"""Closed-world multiple-choice problems whose answers clingo proves.

world.py     what a problem is: a logic program, its text, its queries, and the mistakes that give wrong options
words.py     the glossary: ASCII ids in programs, words in texts
prove.py     runs clingo: a program proves exactly one option, or is refused
untrusted.py, bounds.py     the same for rules that a model wrote, in a process of its own; integers that may wrap
derive.py    why an atom holds or fails, from the rule instances that fired in clingo
chaining.py, ordering.py, table.py, arithmetic.py     one family each
generate.py  from a seed to the problems of a question file
"""
