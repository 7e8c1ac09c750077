"""Checkpoints on their way to storage: one at a time, while training goes on, and nothing left of one that failed.

Knows Ray Train's storage; nothing of models.
"""

import threading
from contextlib import suppress

import ray.train


class CheckpointUploads:
    """Uploads a run's checkpoints; an instance is what `ray.train.report` takes as `checkpoint_upload_fn`.

    Two at a time would share the room that is left, and where it is enough for one neither would be whole.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._ended.set()
        self._failure: Exception | None = None

    def begin(self) -> None:
        """Wait for the last upload to end, so that checkpoints do not pile up where storage is slower than they come.

        To be called before each report.

        Raises:
            Exception: what the last upload failed of.
        """
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        self._ended.clear()

    def __call__(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Upload a checkpoint; Ray calls this, in a thread where the report was asynchronous.

        Raises:
            OSError: storage does not take it.
        """
        storage = ray.train.get_context().get_storage()
        try:
            return storage.persist_current_checkpoint(checkpoint, name)
        except Exception as error:
            self._failure = error
            with suppress(OSError):  # part of a checkpoint is of no use, and would take the room of the next
                storage.storage_filesystem.delete_dir(storage.build_checkpoint_path_from_name(name))
            raise
        finally:
            self._ended.set()
