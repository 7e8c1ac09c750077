"""How long a new process takes to import the core, and to show the command's help.

    python -m tests.bench.startup [--rounds 5]

Out: JSON, the median of each in seconds, without the first, which fills the file system's caches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

WAYS = {"import_core_s": ["-c", "import mmllm_core"], "help_s": ["-m", "cluster.cli", "--help"]}


def seconds_of(arguments: list[str]) -> float:
    """Of a new Python with these arguments."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    taken = {name: [seconds_of(way) for _ in range(options.rounds + 1)][1:] for name, way in WAYS.items()}
    print(json.dumps({name: statistics.median(seconds) for name, seconds in taken.items()} | {"seconds": taken}))


if __name__ == "__main__":
    main()
