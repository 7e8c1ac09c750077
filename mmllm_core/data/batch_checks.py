"""Checks that take long, in batches, in worker processes; their faults are told in the order of the rows.

In: items with row number and id. Out: calls of `tell`. At most a few batches wait at any time, so memory stays flat.
Does not know what is checked.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import get_context
from typing import Generic, TypeVar

from mmllm_core.data.record import Fault
from mmllm_core.errors import EnvironmentLack

_BATCH = 256

Item = TypeVar("Item")


class WorkerProcesses:
    """Processes that start when the first full batch is there: a small file is not worth them."""

    def __init__(self, count: int):
        self.count = count
        self.started = False

    @cached_property
    def executor(self) -> ProcessPoolExecutor:
        """The running processes."""
        self.started = True
        # Spawned: a tokenizer's threads, once started, do not survive a fork.
        return ProcessPoolExecutor(self.count, mp_context=get_context("spawn"))


@contextmanager
def worker_processes(count: int) -> Iterator[WorkerProcesses]:
    """Worker processes that end with the block.

    Raises:
        EnvironmentLack: a process was killed, most likely for want of memory.
    """
    workers = WorkerProcesses(count)
    try:
        yield workers
    except BrokenProcessPool as error:
        raise EnvironmentLack("a worker process was ended from outside: free memory or use fewer workers") from error
    finally:
        if workers.started:
            workers.executor.shutdown(cancel_futures=True)


class BatchChecks(Generic[Item]):
    """Gathers items into batches and tells what was found, first rows first.

    Args:
        check: items to one fault or None each; picklable.
        tell: takes a fault, the row's number and its id.
    """

    def __init__(
        self,
        workers: WorkerProcesses,
        check: Callable[[list[Item]], list[Fault | None]],
        tell: Callable[[Fault, int, str], None],
    ):
        self._workers = workers
        self._check = check
        self._tell = tell
        self._batch: list[tuple[int, str, Item]] = []
        self._waiting: deque[tuple[list[tuple[int, str, Item]], Future[list[Fault | None]]]] = deque()

    def put(self, row: int, id: str, item: Item) -> None:
        """Add an item; waits if the processes are behind."""
        self._batch.append((row, id, item))
        if len(self._batch) == _BATCH:
            future = self._workers.executor.submit(self._check, [item for _, _, item in self._batch])
            self._waiting.append((self._batch, future))
            self._batch = []
            if len(self._waiting) > 2 * self._workers.count:
                self._collect()

    def finish(self) -> None:
        """Wait for all batches; the last one, which is not full, is checked here."""
        rest = self._check([item for _, _, item in self._batch]) if self._batch else []
        while self._waiting:
            self._collect()
        self._report(self._batch, rest)

    def _collect(self) -> None:
        batch, future = self._waiting.popleft()
        self._report(batch, future.result())

    def _report(self, batch: list[tuple[int, str, Item]], faults: list[Fault | None]) -> None:
        for (row, id, _), fault in zip(batch, faults, strict=True):
            if fault is not None:
                self._tell(fault, row, id)
