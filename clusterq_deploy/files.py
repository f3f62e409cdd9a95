"""Write files so that a reader sees the old content or the new, never a part of it; identify files; read graphs."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from clusterq_deploy.errors import ExportError, RunDirectoryError

TEMPORARY = ".*.tmp"
"""The pattern of file names during a write."""


def write_bytes(path: Path, *data: bytes | memoryview) -> None:
    """Write the parts of `data` to `path` in one atomic step; create missing parent directories.

    The data is written to a temporary file next to `path`, flushed to the disk, and renamed. On any failure `path` is
    unchanged and the temporary file is removed.

    Raises:
        RunDirectoryError: the disk is full or read-only, or access is denied.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_utf8(path: Path) -> bool:
    """Return whether a path can be encoded in UTF-8; on Linux it may be any bytes."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def sha256_file(path: Path) -> str:
    """Return SHA-256 of the file's content, in hexadecimal.

    Raises:
        RunDirectoryError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror or error}") from error


def fingerprint(path: Path) -> str:
    """Return a digest of a file's content, or of the names, sizes and times of the files in a folder, through links.

    Raises:
        RunDirectoryError: something cannot be read.
    """
    if not path.is_dir():
        return sha256_file(path)
    listing = hashlib.sha256()
    try:
        for file in sorted(_files(path)):
            state = file.stat()
            listing.update(os.fsencode(f"{file.relative_to(path)}\0{state.st_size}\0{state.st_mtime_ns}\0"))
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror or error}") from error
    return listing.hexdigest()


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder, through links, except in folders that contain themselves or are not readable."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(folder.iterdir())
    except PermissionError:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry, above | {real})
        elif entry.is_file():
            yield entry


def read_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, with the weights that may be next to it.

    Raises:
        ExportError: it cannot be read, or is not ONNX.
    """
    try:
        model = onnx.load(path)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{path} is not an ONNX file: {str(error).splitlines()[0]}") from error
    if not model.HasField("graph"):
        raise ExportError(f"{path} is not an ONNX file: it has no graph")
    return model
