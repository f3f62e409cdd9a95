"""Atomic writes: whatever goes wrong, the old file stays whole and nothing is left next to it."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from support import run_python

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.files import fingerprint, sha256_file, write_bytes


def test_write_bytes_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_bytes(path, memoryview(b"first"))
    write_bytes(path, b"zweite ", "Übung\n".encode())
    assert path.read_bytes() == "zweite Übung\n".encode()
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_write_bytes_on_a_full_file_system_keeps_the_old_file(tmp_path: Path) -> None:
    """The kernel refuses the write after the first of two megabytes: a limit that no double has set."""
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; from clusterq_deploy.files import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "write_bytes(Path(sys.argv[1]), bytes(2**21))\n"
    )
    answer = run_python("-c", code, path)
    assert answer.returncode == 1
    assert f"RunDirectoryError: cannot write {path}: File too large" in answer.stderr
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_write_bytes_names_the_path_and_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunDirectoryError) as caught:
        write_bytes(tmp_path / "file", b"text")
    assert str(caught.value) == f"cannot write {tmp_path / 'file'}: {os.strerror(code)}"
    assert names(tmp_path) == []


def test_write_bytes_leaves_nothing_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"text")
    assert names(tmp_path) == []


def test_write_bytes_refuses_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*run/file: "):
        write_bytes(tmp_path / "run" / "file", b"text")


def test_sha256_file(tmp_path: Path) -> None:
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


def test_fingerprint_follows_links_and_no_loops(tmp_path: Path) -> None:
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
