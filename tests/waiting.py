"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def wait_for(true: Callable[[], object], what: str, seconds: float = 180) -> None:
    """Until something is so.

    Raises:
        TimeoutError: it did not come to be so.
    """
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)
