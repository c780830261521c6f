"""Attention that moves less, and how little it can move.

attention_io.py   the least transfers for every size of fast memory, and programs that reach them
"""
