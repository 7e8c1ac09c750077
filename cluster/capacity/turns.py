"""Models that take turns on one core. In: how busy they are. Out: how fast one of them computes."""

from itertools import combinations

import numpy as np


def share_in_turns(others: list[float]) -> float:
    """Mean share of what is taken in turns, for one beside others that are busy so much of the time, each by chance."""
    share = 0.0
    for n in range(len(others) + 1):
        for some in combinations(range(len(others)), n):
            chances = (busy if i in some else 1 - busy for i, busy in enumerate(others))
            share += float(np.prod(list(chances))) / (n + 1)
    return share
