"""Measuring machines, and calibrating them.

profiles.py    measured profiles of any known layout as one table of rows; what is refused, by name
layouts/       one file a layout: vidur, mha (latency tables of attention), plain (our own)
calibrate.py   constants fitted to profiles, and how far predictions are from measured rows
"""
