"""Make the environments of peers: python -m benchmarks.peers NAME..."""

from __future__ import annotations

import sys

from benchmarks.peers import make, names

for name in sys.argv[1:] or names():
    print(make(name))
