"""The run directory: its files, its lock, and its finished stages."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.files import TEMPORARY, is_utf8, sha256_file, write_bytes
from clusterq_deploy.run.checkpoint import FileCheckpoint
from clusterq_deploy.run.manifest import CONFIG, MANIFEST, StageRecord, digest, read_manifest, result_digest
from clusterq_deploy.run.stage import Json

LOCK = ".lock"
CHECKPOINTS = ".checkpoints"


class RunDirectory:
    """A folder that one model's run writes to.

    The first write locks it: writing from another process is an error until this one ends.

    Args:
        path: the folder; created when something is first written.
        model: name and weights digest of the model.
        command: the command line of this process.
        is_outdated: returns from a stage's name and record whether an earlier version of this program did it in
            another way; such a stage and those that depend on it count as not done.

    Attributes:
        last_command: the command line that did the last stage; empty if unknown.
        outdated: the names of the outdated stages.

    Raises:
        RunDirectoryError: the folder has another model's run or files of no run, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        model: Mapping[str, str],
        command: Iterable[str] = (),
        is_outdated: Callable[[str, StageRecord], bool] = lambda _name, _record: False,
    ) -> None:
        self.path = path
        self.last_command: list[str] = []
        self.outdated: list[str] = []
        self._is_outdated = is_outdated
        self._model, self._command = dict(model), list(command)
        self._stages: dict[str, StageRecord] = {}
        self._performed: set[str] = set()
        self._hashes: dict[tuple[Path, int, int], str] = {}
        self._lock: FileLock | None = None
        self._read()

    def _read(self) -> None:
        """Read from the manifest which stages are finished."""
        path = self.path
        if not is_utf8(path):
            raise RunDirectoryError(f"{str(path)!r} is not UTF-8, which safetensors cannot read; choose another")
        manifest = read_manifest(path)
        if manifest is None:
            if path.exists() and not path.is_dir():
                raise RunDirectoryError(f"{path} is a file; choose a folder with --out")
            ours = {LOCK, CHECKPOINTS, *(file.name for file in path.glob(TEMPORARY))}
            if path.is_dir() and any(file.name not in ours for file in path.iterdir()):
                raise RunDirectoryError(f"{path} holds files of no run; choose an empty folder with --out")
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
        self.last_command = manifest.command

    def _acquire_lock(self) -> None:
        """Lock the folder for this process, once, and read the manifest again: it may have changed before the lock."""
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
        if not os.access(self.path, os.W_OK):  # before the work, whose result could not be written
            raise RunDirectoryError(f"cannot write to {self.path}: {os.strerror(errno.EACCES)}")
        self._lock = lock
        for file in self.path.rglob(TEMPORARY):  # of a process that was killed during a write
            file.unlink(missing_ok=True)
        self._read()

    def write_config(self, config: str) -> None:
        """Write the configuration and an initial manifest, before the first stage.

        Raises:
            RunDirectoryError: another process is at work in it, or it cannot be written.
        """
        self._acquire_lock()
        self._save()
        self.write(CONFIG, config)

    @property
    def commands(self) -> list[list[str]]:
        """The distinct command lines that did the stages, in order; the last one did the last stage."""
        commands = [record.command for record in self._stages.values() if record.command != self.last_command]
        distinct = dict.fromkeys(map(tuple, [*commands, self.last_command]))
        return [list(command) for command in distinct if command]

    def finished(self, stage: str, inputs: str | None = None) -> StageRecord | None:
        """Return the record of a stage whose inputs, files and upstream stages are unchanged, or None."""
        record = self._stages.get(stage)
        if record is None or (inputs is not None and record.inputs != inputs):
            return None
        if any(self._sha256(name) != sha256 for name, sha256 in record.files.items()):
            return None
        for name, recorded in record.upstream.items():
            source = self.finished(name)
            if source is None or source.digest != recorded:
                return None
        return record

    def perform(
        self, stage: str, inputs: Json, work: Callable[[], tuple[Json, list[str]]], upstream: Sequence[str] = ()
    ) -> StageRecord:
        """Do a stage unless it is finished with the same inputs; do a provisional one again, once per process.

        Args:
            stage: its name, unique in the run.
            inputs: what its result depends on.
            work: returns the result and the files that it wrote, relative to the run directory.
            upstream: the finished stages that it reads.

        Raises:
            RunDirectoryError: another process is at work in the folder, or it cannot be written.
        """
        self._acquire_lock()
        record = self.look_up(stage, inputs, upstream)
        if record is None:
            inputs_digest, sources = self._digests(inputs, upstream)
            start = time.perf_counter()
            result, names = work()
            files = {name: sha256_file(self.path / name) for name in names}
            seconds = time.perf_counter() - start
            record = StageRecord(inputs_digest, sources, files, result, seconds, result_digest(result), self._command)
            self._stages.pop(stage, None)  # the stages are in the order in which they were done
            self._stages[stage], self.last_command = record, self._command
            self._performed.add(stage)
            self._save()
        self.remove_checkpoints(stage)
        return record

    def remove_checkpoints(self, stage: str = "") -> None:
        """Remove the checkpoints of a stage, or of all stages, and their folders."""
        self._acquire_lock()
        checkpoints = self.path / CHECKPOINTS / stage
        shutil.rmtree(checkpoints, ignore_errors=True)
        with suppress(OSError):
            for folder in checkpoints.parents:
                if folder == self.path:
                    break
                folder.rmdir()

    def checkpoint(self, stage: str, part: str, inputs: Json, upstream: Iterable[str] = ()) -> FileCheckpoint:
        """Return the checkpoint of one `part` of a stage, such as a batch size; `perform` removes it at the end."""
        return FileCheckpoint(self.path / CHECKPOINTS / stage / part, self._digests(inputs, upstream)[0])

    def look_up(self, stage: str, inputs: Json, upstream: Iterable[str] = ()) -> StageRecord | None:
        """Return the record that `perform` would return without doing the stage; None if it would do it."""
        record = self.finished(stage, self._digests(inputs, upstream)[0])
        return None if record is None or (record.provisional and stage not in self._performed) else record

    def _digests(self, inputs: Json, upstream: Iterable[str]) -> tuple[str, dict[str, str]]:
        """Return the digest of all that a stage depends on, and those of its upstream stages."""
        sources = {name: record.digest for name in upstream if (record := self.finished(name)) is not None}
        return digest({"inputs": inputs, "upstream": sources}), sources

    def _sha256(self, name: str) -> str | None:
        """Return the digest of a file of the run, or None; an unchanged file is read once."""
        path = self.path / name
        try:
            if not path.is_file():
                return None
            state = path.stat()
        except OSError:  # a manifest that was altered may have an impossible name
            return None
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self._hashes:
            self._hashes[key] = sha256_file(path)
        return self._hashes[key]

    def write(self, name: str, content: bytes | str) -> str:
        """Write a file of the run atomically; return its name."""
        self._acquire_lock()
        write_bytes(self.path / name, content.encode() if isinstance(content, str) else content)
        return name

    def _save(self) -> None:
        stages = {name: vars(record) for name, record in self._stages.items()}
        text = json.dumps({"schema": 1, "model": self._model, "command": self.last_command, "stages": stages}, indent=1)
        self.write(MANIFEST, text + "\n")


def _describe(model: Mapping[str, str]) -> str:
    return f"{model.get('name')} (weights {model.get('weights_sha256', '')[:8]})"
