"""Answers for all three ways to scale, each in a process of its own where that is worth it and there are cores.

In: a question. Out: three answers, and how far they are meanwhile.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, get_args

from cluster.capacity.answer import Answer, Question, answer, expected_ticks, require_answerable
from cluster.capacity.simulation import Way

WAYS: tuple[Way, ...] = get_args(Way)
_WORTH_PROCESSES = 10_000
"""Ticks of an answer, below which it is there sooner than a process has started."""


def answers(question: Question, tell: Callable[[float], object]) -> tuple[Answer, Answer, Answer]:
    """Each modality by itself, the whole, and the whole with models in turns.

    Args:
        tell: called now and then, with the share that is done.

    Raises:
        ConfigError: as `require_answerable`.
    """
    for way in WAYS:
        require_answerable(question, way)
    expected = expected_ticks(question)
    passed = [0] * len(WAYS)

    def show() -> None:
        tell(sum(min(1.0, ticks / expected) for ticks in passed) / len(WAYS))

    processes = min(len(os.sched_getaffinity(0)), len(WAYS))
    if processes == 1 or expected < _WORTH_PROCESSES:

        def note(way: int, ticks: int) -> None:
            passed[way] += ticks
            show()

        parts, whole, packed = (answer(question, way, lambda n, i=i: note(i, n)) for i, way in enumerate(WAYS))  # type: ignore[misc]
        return parts, whole, packed
    context = get_context("spawn")  # what draws the bar runs in threads, which do not survive a fork
    shared = context.Array("q", len(WAYS))
    with ProcessPoolExecutor(processes, context, _share, (shared,)) as pool:
        waiting = [pool.submit(_answer, question, i) for i in range(len(WAYS))]
        while wait(waiting, timeout=0.2).not_done:
            passed = [expected if one.done() else ticks for one, ticks in zip(waiting, shared[:], strict=True)]
            show()
        parts, whole, packed = (one.result() for one in waiting)
    return parts, whole, packed


_ticks: Any = None


def _share(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _answer(question: Question, i: int) -> Answer:
    def note(n: int) -> None:
        _ticks[i] += n

    return answer(question, WAYS[i], note)
