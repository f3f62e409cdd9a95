"""The run directory: its files, its lock, and stages that are done once."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.files import TEMPORARY, is_utf8, sha256_file, write_bytes, write_text
from clusterq_deploy.run.checkpoint import FileCheckpoint
from clusterq_deploy.run.manifest import CONFIG, MANIFEST, Result, StageRecord, digest, read_manifest, result_digest

LOCK = ".lock"
CHECKPOINTS = ".checkpoints"


class RunDirectory:
    """A folder that one model's run writes to.

    From the first write on it is this process's alone: others that would write end in an error. The operating system
    takes the lock from a process that dies, so that none is left behind.

    Args:
        path: the folder; made when something is first written.
        model: name and weights digest of the model.
        command: the command line of this process.
        is_outdated: of a stage's name and record, whether another version of this program did it otherwise than this
            one does: such a stage counts as not done, and so does what builds on it.

    Attributes:
        made_by: the command line that did the last stage that was done; empty where that is not known.
        outdated: the names of the stages that are outdated.

    Raises:
        RunDirectoryError: the folder holds another model's run, or files that are no run's, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        model: Mapping[str, str],
        command: Iterable[str] = (),
        is_outdated: Callable[[str, StageRecord], bool] = lambda _name, _record: False,
    ) -> None:
        self.path = path
        self.made_by: list[str] = []
        self.outdated: list[str] = []
        self._is_outdated = is_outdated
        self._model, self._command = dict(model), list(command)
        self._stages: dict[str, StageRecord] = {}
        self._done: set[str] = set()
        self._hashes: dict[tuple[Path, int, int], str] = {}
        self._lock: FileLock | None = None
        self._read()

    def _read(self) -> None:
        """Learn from the manifest what is finished, if the folder is this model's or empty."""
        if not is_utf8(self.path):
            raise RunDirectoryError(f"{str(self.path)!r} is not UTF-8, which safetensors cannot read; choose another")
        path, manifest = self.path, read_manifest(self.path)
        if manifest is None:
            if path.exists() and not path.is_dir():
                raise RunDirectoryError(f"{path} is a file; choose a folder with --out")
            own = {LOCK, CHECKPOINTS, *(file.name for file in path.glob(TEMPORARY))}
            if path.is_dir() and any(file.name not in own for file in path.iterdir()):
                raise RunDirectoryError(f"{path} holds files that are no run's; choose an empty folder with --out")
            return
        if manifest.model != self._model:
            raise RunDirectoryError(
                f"{path} holds a run of {_describe(manifest.model)}, not of {_describe(self._model)}; "
                "choose another folder with --out"
            )
        self.outdated = [name for name, record in manifest.stages.items() if self._is_outdated(name, record)]
        self._stages = {
            name: record for name, record in manifest.stages.items() if record.is_whole and name not in self.outdated
        }
        self.made_by = manifest.command

    def _acquire_lock(self) -> None:
        """Take the folder for this process, if it has not got it yet; another one may have worked there meanwhile."""
        if self._lock is not None:
            return
        lock = FileLock(self.path / LOCK, is_singleton=True, thread_local=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"another clusterq is at work in {self.path}; wait for it, or choose another folder with --out"
            ) from None
        except OSError as error:
            raise RunDirectoryError(f"cannot write to {self.path}: {error.strerror or error}") from error
        if not os.access(self.path, os.W_OK):  # before the work, whose result could not be kept
            raise RunDirectoryError(f"cannot write to {self.path}: {os.strerror(errno.EACCES)}")
        self._lock = lock
        for left in self.path.rglob(TEMPORARY):  # by a process that was killed as it wrote
            left.unlink(missing_ok=True)
        self._read()

    def write_config(self, config: str) -> None:
        """Mark the folder as this run's, with its configuration, before the first stage.

        Raises:
            RunDirectoryError: another process is at work in it, or it cannot be written.
        """
        self._acquire_lock()
        self._save()
        self.write(CONFIG, config)

    @property
    def commands(self) -> list[list[str]]:
        """The command lines that did the stages, each once, in order; the last one did the last stage."""
        done = dict.fromkeys(tuple(record.command) for record in self._stages.values() if record.command)
        last = tuple(self.made_by)
        return [list(own) for own in (*(own for own in done if own != last), last) if own]

    def finished(self, stage: str, inputs: str | None = None) -> StageRecord | None:
        """The record of a finished stage, or None.

        Finished means: with these inputs, all its files intact, and the stages that it built on unchanged since.
        """
        record = self._stages.get(stage)
        if record is None or (inputs is not None and record.inputs != inputs):
            return None
        if any(self._sha256(name) != sha256 for name, sha256 in record.files.items()):
            return None
        for name, known in record.upstream.items():
            source = self.finished(name)
            if source is None or source.digest != known:
                return None
        return record

    def perform(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        work: Callable[[], tuple[Result, list[str]]],
        upstream: Iterable[str] = (),
    ) -> StageRecord:
        """Do a stage unless it is finished with the same inputs; one that is provisional is done again, once a process.

        Args:
            stage: its name, unique in the run.
            inputs: JSON values that its result depends on.
            work: does it; gives the result and the files that it wrote, relative to the run directory.
            upstream: the finished stages that it builds on.

        Raises:
            RunDirectoryError: another process is at work in the folder, or it cannot be written.
        """
        self._acquire_lock()
        own, sources = self._digests(inputs, upstream)
        record = self._settled(stage, own)
        if record is None:
            start = time.perf_counter()
            result, names = work()
            files = {name: sha256_file(self.path / name) for name in names}
            seconds = time.perf_counter() - start
            record = StageRecord(own, sources, files, result, seconds, result_digest(result), self._command)
            self._stages.pop(stage, None)  # they stand in the order in which they were done
            self._stages[stage], self.made_by = record, self._command
            self._done.add(stage)
            self._save()
        self._forget(self.path / CHECKPOINTS / stage)
        return record

    def remove_checkpoints(self) -> None:
        """Remove what is left of checkpoints, of stages that were begun once and are asked for no longer."""
        self._acquire_lock()
        self._forget(self.path / CHECKPOINTS)

    def _forget(self, checkpoints: Path) -> None:
        """Remove a stage's checkpoints, and the folders that are empty without them."""
        shutil.rmtree(checkpoints, ignore_errors=True)
        with suppress(OSError):
            for folder in checkpoints.parents:
                if folder == self.path:
                    break
                folder.rmdir()

    def checkpoint(
        self, stage: str, part: str, inputs: Mapping[str, Any], upstream: Iterable[str] = ()
    ) -> FileCheckpoint:
        """Where the work of `perform` keeps what it has reached; it is removed when the stage is finished.

        Args:
            stage, inputs, upstream: as for `perform`.
            part: the name of this way of doing it among others of the same stage.
        """
        key = self._digests(inputs, upstream)[0]
        return FileCheckpoint(self.path / CHECKPOINTS / stage / part, key)

    def look_up(self, stage: str, inputs: Mapping[str, Any], upstream: Iterable[str] = ()) -> StageRecord | None:
        """The record with which `perform` would do nothing; None where it would do the stage."""
        return self._settled(stage, self._digests(inputs, upstream)[0])

    def _settled(self, stage: str, inputs: str) -> StageRecord | None:
        """The record of a stage that is finished with these inputs, unless it is provisional and of another process."""
        record = self.finished(stage, inputs)
        return None if record is None or (record.provisional and stage not in self._done) else record

    def _digests(self, inputs: Mapping[str, Any], upstream: Iterable[str]) -> tuple[str, dict[str, str]]:
        """The digest of all that a stage depends on, and those of the stages among it."""
        sources = {name: record.digest for name in upstream if (record := self.finished(name)) is not None}
        return digest({"inputs": dict(inputs), "upstream": sources}), sources

    def _sha256(self, name: str) -> str | None:
        """Digest of a file of the run, or None where there is none; read once for each state of the file."""
        path = self.path / name
        try:
            if not path.is_file():
                return None
            state = path.stat()
        except OSError:  # a manifest that was altered may name what no file system has
            return None
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self._hashes:
            self._hashes[key] = sha256_file(path)
        return self._hashes[key]

    def write(self, name: str, content: bytes | str) -> str:
        """Write a file of the run atomically; gives its name."""
        self._acquire_lock()
        if isinstance(content, str):
            write_text(self.path / name, content)
        else:
            write_bytes(self.path / name, content)
        return name

    def _save(self) -> None:
        stages = {name: vars(record) for name, record in self._stages.items()}
        text = json.dumps({"schema": 1, "model": self._model, "command": self.made_by, "stages": stages}, indent=1)
        self.write(MANIFEST, text + "\n")


def _describe(model: Mapping[str, str]) -> str:
    return f"{model.get('name')} (weights {model.get('weights_sha256', '')[:8]})"
