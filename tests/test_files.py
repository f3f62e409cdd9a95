"""Atomic writes: whatever goes wrong, the old file stays whole and nothing is left beside it."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.files import fingerprint, sha256_file, write_bytes, write_text


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_bytes(path, memoryview(b"first"))
    write_text(path, "zweite Übung\n")
    assert path.read_bytes() == "zweite Übung\n".encode()
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_file_system_that_ends_in_the_middle(tmp_path: Path) -> None:
    """The kernel refuses the write after the first of two megabytes: a limit that no double has set."""
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; from clusterq_deploy.files import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "write_bytes(Path(sys.argv[1]), bytes(2**21))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert f"RunDirectoryError: cannot write {path}: File too large" in answer.stderr
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_message_names_the_path_and_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunDirectoryError) as caught:
        write_text(tmp_path / "file", "text")
    assert str(caught.value) == f"cannot write {tmp_path / 'file'}: {os.strerror(code)}"
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file", "text")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes to read-only directories")
def test_a_directory_without_write_access(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunDirectoryError, match="Permission denied"):
            write_text(tmp_path / "file", "text")
    finally:
        tmp_path.chmod(0o755)


def test_a_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*run/file: "):
        write_text(tmp_path / "run" / "file", "text")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(RunDirectoryError, match=r"cannot read .*none: No such file"):
        sha256_file(tmp_path / "none")


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_of_links_is_told_by_what_they_lead_to(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "real" / name).mkdir(parents=True)
        (tmp_path / "real" / name / f"{name}.png").write_bytes(name.encode())
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "0").symlink_to(tmp_path / "real/cats")
    (linked / "1").symlink_to(tmp_path / "real/dogs")
    (linked / "itself").symlink_to(linked)
    (linked / "loop").symlink_to(linked / "loop")
    (linked / "nowhere").symlink_to(linked / "gone")
    before = fingerprint(linked)
    assert before == fingerprint(linked)
    (tmp_path / "real/cats").rename(tmp_path / "real/mice")
    (tmp_path / "real/dogs").rename(tmp_path / "real/cats")
    (tmp_path / "real/mice").rename(tmp_path / "real/dogs")
    assert fingerprint(linked) != before  # their labels are others
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fingerprint(empty) not in {before, fingerprint(linked)}
