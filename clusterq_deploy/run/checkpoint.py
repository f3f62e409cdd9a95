"""Checkpoints of a stage in its run directory, from which the same command resumes after its process was killed."""

import hashlib
import io
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import torch

from calib.support.checkpoint import State
from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.files import write_bytes

logger = logging.getLogger(__name__)

_EVERY = 30.0
"""Seconds. With the interrupted step and the time to read a checkpoint, a killed process loses less than a minute."""

_LARGEST_SHARE = 0.1
"""Of the time, for writing: slow writes happen less often."""


class FileCheckpoint:
    """Saves states in files, one per phase: the digest of the rest, then torch's format.

    Files of other work and files that are damaged or unreadable are ignored. If a state cannot be written, because the
    disk or the memory is full, a warning is logged.

    Args:
        folder: where the files are; created when something is first saved.
        key: identifies the work: everything that its result depends on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._due = time.monotonic() + _EVERY

    def load(self, phase: str) -> State | None:
        """Return the state of a phase, or None; reading a file executes no code from it."""
        try:
            with (self._folder / phase).open("rb") as file:
                digest, content = file.read(hashlib.sha256().digest_size), io.BytesIO(file.read())
            if hashlib.sha256(content.getbuffer()).digest() != digest:
                return None
            saved = torch.load(content, map_location="cpu", weights_only=True)
        except (OSError, EOFError, MemoryError, RuntimeError, pickle.UnpicklingError):
            return None
        if saved["key"] != self._key:
            return None
        logger.info("resuming from the checkpoint %s", self._folder / phase)
        state: State = saved["state"]
        return state

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Save the state of a phase, every 30 seconds or `at_once`."""
        start = time.monotonic()
        if start < self._due and not at_once:
            return
        buffer = io.BytesIO()
        try:
            torch.save({"key": self._key, "state": state()}, buffer)
            content = buffer.getbuffer()
            write_bytes(self._folder / phase, hashlib.sha256(content).digest(), content)
        except (RunDirectoryError, MemoryError) as error:
            logger.warning("no checkpoint was written: %s", error or "there is not enough memory")
        end = time.monotonic()
        self._due = end + max(_EVERY, (end - start) / _LARGEST_SHARE)
