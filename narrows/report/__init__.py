"""What a person reads: tables on a terminal, one self-contained HTML file, and the pictures in it.

units.py      numbers with units, rounded to what can be said
model.py      Report, Proof, Quality: the plain data of a whole job
text.py       tables for terminals and pipes
html.py       report.html
roofline.py   the roofline picture (matplotlib)
bars.py       where the time goes, what fits, intervals (SVG by hand)
"""
