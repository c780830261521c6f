"""How long the shell takes to answer, beside a bare Python start: python -m benchmarks.shell

Commands take turns, so the ratios hold on a noisy machine. Nothing is gated.
"""

from __future__ import annotations

import subprocess
import sys

from narrows.measure.timing import interleave

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import narrows": ["-c", "import narrows"],
    "import numpy": ["-c", "import numpy"],
    "narrows machines": ["-m", "narrows.cli", "machines"],
    "narrows methods kv": ["-m", "narrows.cli", "methods", "kv"],
    "narrows bound": ["-m", "narrows.cli", "bound", "llama-3-70b", "--machine", "h100-sxm"],
    "narrows find": ["-m", "narrows.cli", "find", "llama-3-8b", "--machine", "h100-sxm"],
}


def main(repeats: int = 11) -> None:
    """Time and print."""

    def call(arguments: list[str]):
        return lambda: subprocess.run([sys.executable, *arguments], capture_output=True, check=True)

    timings = interleave({n: call(a) for n, a in COMMANDS.items()}, repeats, warmup=1)
    base = "python -c pass"
    print(f"{'command':22} {'seconds':>8} {'over a bare start':>18} {'spread':>7}")
    for name in COMMANDS:
        ratio = timings.ratio(name, to=base)
        print(f"{name:22} {timings[name].median:8.3f} {ratio.median:17.1f}x {ratio.spread:7.0%}")


if __name__ == "__main__":
    main()
