"""The main job, from the question to the proof.

job.py      relieve    measure, bound, find, apply the best, prove it: the report
proof.py    prove      a technique on the real model, timed beside the dense cache and others
stacks.py   priced     which single techniques and stacks there are, and what the bound says of each
judge.py    Judge      what each costs in quality, on the reference model, with intervals
search.py   search     the fastest within limits of quality, and the best single one beside it
"""

from narrows.relieve.job import relieve

__all__ = ["relieve"]
