"""How long `mmllm demo` takes from an empty cache to its third answer, and how well what it trained answers.

    python -m tests.bench.demo --home FOLDER [--short]

FOLDER is `MMLLM_HOME`, must be empty or an earlier bench's, and keeps what the demo made: other benches use its bundle.
Out: JSON with `whole` or `short`: minutes, and the share of held-out questions that are answered rightly.
"""

import argparse
import json
import os
import socket
import time
from pathlib import Path

from tests.bench.scratch import emptied, mmllm


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    folder = emptied(options.home.absolute())
    os.environ["MMLLM_HOME"] = str(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    mmllm("demo", "--no-stay", "--port", str(port), *(["--short"] if options.short else []))
    minutes = (time.monotonic() - began) / 60

    from train_jobs.run_record import read_run

    after = read_run("embedded-demo").overall("after")
    assert after is not None
    found = {"minutes": minutes, "accuracy": after.accuracy, "asked": after.asked}
    print(json.dumps({"short" if options.short else "whole": found}))


if __name__ == "__main__":
    main()
