"""Writing whole or not at all: writers at once, writers that were killed, disks that refuse."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from balcony_edge import files
from balcony_edge.control.trace import LinesWriter
from balcony_edge.errors import InputError
from balcony_edge.files import locked, partial_directory, require_writable, require_writable_file, write_atomically


def test_threads_that_write_one_file_at_once_leave_one_of_theirs(tmp_path: Path) -> None:
    contents = [bytes([65 + number]) * 50_000 for number in range(8)]

    def write(content: bytes) -> None:
        for _ in range(5):
            write_atomically(tmp_path / "file", content, InputError, "free space")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert (tmp_path / "file").read_bytes() in contents and list(tmp_path.iterdir()) == [tmp_path / "file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    (tmp_path / "file").chmod(0o640)
    write_atomically(tmp_path / "file", b"new", InputError, "free space")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640, "only some may read it"


def test_a_name_that_no_file_may_have_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"^trace 'a\\x00b': has a NUL character, .*: give the path of a file$"):
        LinesWriter("a\0b")


def test_the_page_of_errors_names_what_a_killed_writer_leaves(tmp_path: Path) -> None:
    """Hundreds of megabytes in a hidden directory, for good where the next export has another name."""
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"`(\.bundle\.\S+)`\), which the next one with the same output removes", page)
    (leftover := tmp_path / name).mkdir()
    with partial_directory(tmp_path / "bundle-small"):
        assert leftover.exists()
    with partial_directory(tmp_path / "bundle"):
        assert not leftover.exists()


def test_leftovers_of_a_killed_writer_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from balcony_edge.files import partial_directory\n"
        "with partial_directory(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "x[1]")], check=False).returncode == -9
    (killed,) = tmp_path.iterdir()
    with partial_directory(tmp_path / "x[1]") as first, partial_directory(tmp_path / "x[1]") as second:
        assert set(tmp_path.iterdir()) == {first, second} and killed not in (first, second)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "\U0001f9f1" * 63])
def test_the_longest_names_are_written(name: str, tmp_path: Path) -> None:
    """What is refused only then is refused after the work."""
    require_writable_file(tmp_path / name, "-o", InputError, "make it")
    write_atomically(tmp_path / name, b"new", InputError, "make it")
    assert (tmp_path / name).read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_file_on_nfs_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS gives an exclusive lock only for a descriptor that may write (flock(2))."""
    flock = fcntl.flock

    def of_nfs(descriptor: int, how: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    weights, taken = tmp_path / "weights.bin", InputError("another one is at work")
    weights.write_bytes(b"weights")
    with locked(weights), pytest.raises(InputError, match="another one"), locked(weights, taken):
        pass
    with locked(weights, taken), locked(tmp_path, taken):  # directories have no lock there
        pass


def test_a_process_that_is_forked_meanwhile_does_not_keep_a_lock(tmp_path: Path) -> None:
    """As a worker of multiprocessing that begins while another thread of the application packs the weights."""
    program = """
import os, sys; from pathlib import Path
from balcony_edge.errors import InputError; from balcony_edge.files import locked
until, end = os.pipe()
with locked(Path(sys.argv[1])):
    if not os.fork():
        os.close(end)
        os.read(until, 1)  # until its parent has ended
        os._exit(0)
with locked(Path(sys.argv[1]), InputError("taken")):
    pass
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_a_refused_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "nowhere").write_text("not a directory")
    with pytest.raises(InputError, match=r"nowhere/file: cannot be written \((File exists|Not a directory)\): make it"):
        write_atomically(tmp_path / "nowhere" / "file", b"", InputError, "make it")


@pytest.mark.parametrize("silent", [False, True])
def test_a_path_that_the_system_refuses_to_look_at_is_one_line(
    tmp_path: Path, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``silent``: as from Python 3.14 on, where these say no for every error of the system."""
    if silent:
        for name, look in (("exists", os.path.exists), ("is_dir", os.path.isdir), ("is_file", os.path.isfile)):
            monkeypatch.setattr(Path, name, look)
    path = tmp_path / ("x" * 300)
    with pytest.raises(InputError, match=r"x: cannot be written \(File name too long\): make it"):
        write_atomically(path, b"", InputError, "make it")
    with pytest.raises(InputError, match=r"^-o x: cannot be written \(File name too long\): make it"):
        require_writable_file(path, "-o x", InputError, "make it")
    with pytest.raises(InputError, match=r"x: writing failed \(File name too long\): "):
        LinesWriter(path)


def test_a_drive_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Z:\\ on Windows: not even the root of the path is there."""
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(InputError, match=r"^out: cannot be written \(/ is not a directory\): name another place$"):
        require_writable(tmp_path / "out", "out", InputError, "name another place")


def test_the_file_behind_a_link_is_replaced_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real/file")
    write_atomically(tmp_path / "link", b"new", InputError, "make it")
    assert (tmp_path / "real" / "file").read_bytes() == b"new" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    for refuse in (
        lambda: write_atomically(tmp_path / "pipe", b"", InputError, "name a file"),
        lambda: require_writable_file(tmp_path / "pipe", "pipe", InputError, "name a file"),
    ):
        with pytest.raises(InputError, match=r"pipe: cannot be written \(it is not a regular file\): name a file"):
            refuse()
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_is_a_mount_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Docker's `-v ./out.json:/out.json`: renaming a file to it fails, after minutes of measuring."""
    path, mounts = tmp_path / "my out.json", tmp_path / "mountinfo"
    path.write_bytes(b"old")
    own = str(path).replace(" ", r"\040")  # as the kernel writes it
    mounts.write_text(f"22 1 0:21 / / rw - overlay overlay rw\n36 22 8:1 /out.json {own} rw - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr(files, "_MOUNTS", mounts)
    with pytest.raises(InputError, match=r"^-o out: cannot be replaced .*: mount its directory instead$"):
        require_writable_file(path, "-o out", InputError, "name another place")
    require_writable_file(tmp_path / "other.json", "-o other", InputError, "name another place")
    mounts.unlink()  # a system without such a list
    require_writable_file(path, "-o out", InputError, "name another place")


def test_a_read_only_file_is_refused_where_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where its temporary file, which is read-only as well, would stay."""
    path = tmp_path / "out.json"
    path.write_bytes(b"old")
    path.chmod(0o444)
    monkeypatch.setattr(files, "_REPLACES_READ_ONLY", False)
    for refuse in (
        lambda: write_atomically(path, b"new", InputError, "name another place"),
        lambda: require_writable_file(path, "out.json", InputError, "name another place"),
    ):
        with pytest.raises(InputError, match=r"out\.json: cannot be replaced \(it is read-only\): name another place$"):
            refuse()
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"
