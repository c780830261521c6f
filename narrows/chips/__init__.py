"""Accelerators that are not here: what they would take, derived from their design.

fusemax.py   attention on a spatial array, one pass over the keys
"""
