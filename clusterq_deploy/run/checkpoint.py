"""Checkpoints of a stage in its run directory: what a killed process had reached, for the same command."""

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
"""Seconds. With the step that a process is killed in and the time to read a checkpoint, less than a minute is lost."""

_LARGEST_SHARE = 0.1
"""Of the time, for writing: if that takes long, it is done less often."""


class FileCheckpoint:
    """Keeps states in files, one per phase: the digest of the rest, then torch's format.

    Files of other work, of another state than they were written in, or that cannot be read count as none. A state that
    cannot be written, as the disk or the memory is full, is logged and costs nothing but itself.

    Args:
        folder: where the files are; made when something is first saved.
        key: identifies the work: everything that its result depends on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._due = time.monotonic() + _EVERY

    def load(self, phase: str) -> State | None:
        """Return the state of a phase, or None: see `calib.support.checkpoint.Checkpoint`; reading runs no code."""
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
        logger.info("goes on from its checkpoint in %s", self._folder / phase)
        state: State = saved["state"]
        return state

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Save the state of a phase at once or if it is time to, as it is every 30 seconds."""
        start = time.monotonic()
        if start < self._due and not at_once:
            return
        buffer = io.BytesIO()
        try:
            torch.save({"key": self._key, "state": state()}, buffer)
            content = buffer.getbuffer()
            write_bytes(self._folder / phase, hashlib.sha256(content).digest(), content)
        except (RunDirectoryError, MemoryError) as error:
            logger.warning("no checkpoint was kept: %s", error or "there is not enough memory")
        end = time.monotonic()
        self._due = end + max(_EVERY, (end - start) / _LARGEST_SHARE)
