"""STREAM by one portable program beside native C: GB/s, speed over native, cause of each loss.

python -m benchmarks.stream [cpu:0-1]
"""

from __future__ import annotations

import sys

from narrows.measure.timing import passive_openmp


def main(where: str = "cpu") -> None:
    """Print the table of an executor."""
    passive_openmp()  # before torch is loaded
    from narrows.chips.stream_portability import StreamPortability

    table = StreamPortability(times=20).table(where)
    print(f"{table.threads} threads, arrays of {table.elements * 8 / 2**20:.0f} MiB; medians")
    for row in table.rows:
        line = f"{row.kernel:6} {row.backend:15} {row.bandwidth / 1e9:7.1f} GB/s"
        if row.speed is not None:
            line += f"  {row.speed.median:5.2f} [{row.speed.low:.2f}, {row.speed.high:.2f}]"
        print(f"{line}  {row.cause}".rstrip())
    for name, why in table.missing.items():
        print(f"{name}: not run, {why}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
