"""Layouts of measured profiles, each told by its columns.

table.py   a CSV file, plain or gzipped, as named columns
rows.py    measured rows of any layout: what ran, its work, how long it took
plain.py   the layout of this project, described in docs/profile-format.md
vidur.py   operators of one layer, attention and collectives as microsoft/vidur records them
mha.py     latency tables of attention kernels, as inference-sim records them
"""
