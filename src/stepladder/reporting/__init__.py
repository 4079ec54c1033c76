"""The report: what a finished run measured, as numbers, as words and as one page that opens offline.

measured.py reads the answers and knows who was right; numbers.py makes the JSON of them; words.py puts numbers into
sentences; svg.py and figures.py draw; page.py fills report.html.j2. The page shows the JSON and nothing else.
"""
