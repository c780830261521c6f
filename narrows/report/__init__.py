"""What a person reads: tables on a terminal, one self-contained HTML file, and the pictures in it.

model.py      Report, Proof, Quality     the plain data of a whole job
units.py      si, seconds, percent ...   numbers with units, rounded to what can be said
words.py                                 the sentences that terminal and HTML share
text.py       bound, options, ...        tables for terminals and pipes
verdicts.py   claim_teller, verdicts     claims as they are judged
tables.py                                what all tables share
html.py       write, page                report.html
style.css                                its looks, light and dark, screen and paper
roofline.py   svg                        the roofline picture (matplotlib, imported when asked)
frontier.py   svg                        bytes and speed of what a search of stacks read
picture.py    drawn                      what the two share: colours, axes, a figure as SVG
points.py     points, roofs              what the picture shows
labels.py     Labels                     labels that keep apart
bars.py                                  where the time goes, what fits, intervals
"""
