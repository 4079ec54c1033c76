"""The report: what a finished run measured, as numbers, as sentences and as one page that opens offline.

measured.py joins predictions with labels; numbers.py computes the content of report.json (content.py); words.py makes
sentences of it; svg.py and figures.py draw charts; page.py fills report.html.j2. The page shows only what is in the
JSON. data_card.py and model_card.py write the README files of trainsets and models.
"""
