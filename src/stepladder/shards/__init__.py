"""Pure functions over pieces of files, in this process or in many on one machine or several.

A function of work.py is given an order, which is a small JSON object that names files, and writes its result into a
folder. The result follows from the order alone, so it may be computed twice, anywhere: the first to finish counts.
each.py runs one for every piece; whoever calls it puts the results together in the pieces' order, so that how many
pieces and processes there were is nowhere in them.
"""
