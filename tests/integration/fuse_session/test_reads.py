"""The extension's calls that read layers say what the os module's say, which the core is tested with."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.wire, pytest.mark.root]

PROGRAM = """
import ctypes, errno, os, socket, stat, struct, sys
from pyoverlay.core.reads import PlainReads
from pyoverlay.fuse.binding import wire

os.chdir(sys.argv[1])
refused_with = int(sys.argv[2])
if refused_with:  # a filter, seccomp(2): load the number; getxattrat(2), listxattrat(2): SECCOMP_RET_ERRNO; else SECCOMP_RET_ALLOW
    lines = [(0x20, 0, 0, 0), (0x15, 1, 0, 464), (0x15, 0, 1, 465), (0x06, 0, 0, 0x50000 | refused_with), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
    assert libc.syscall(465, 0, 0, 0, 0, 0) == -1
os.mkdir("directory")
for name in ("file", "-" * 255):
    with open(name, "wb") as file:
        file.write(b"x" * 5000)
os.mkfifo("fifo")
os.mknod("device", 0o600 | stat.S_IFCHR, os.makedev(0x123, 0x45678))
os.symlink("t" * 4000, "symlink")
os.symlink("missing", "dangling")
socket.socket(socket.AF_UNIX).bind("socket")
os.link("file", "link")
os.chown("file", 1234567, 7654321)
os.utime("file", ns=(-1, 13_500_000_000 * 10**9 + 7))
os.utime("directory", ns=(-2 * 10**9 - 1, 5))
for target, attribute, value in (("file", "user.one", b"1"), ("file", "user.empty", b""), ("file", "trusted.long", b"v" * 2000),
        ("directory", "trusted.d", b"d"), ("symlink", "trusted.s", b"s")):
    os.setxattr(target, attribute, value, follow_symlinks=False)
for number in range(12):
    os.setxattr("directory", f"user.{number:0100}", b"")

FIELDS = ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "blocks", "blksize", "rdev", "atime_ns", "mtime_ns", "ctime_ns")
here = os.open(".", os.O_PATH)
names = [os.fsencode(name) for name in os.listdir()] + [b"missing", b"file/below", b"n" * 256, b"missing/below", b"nul\\0", b""]
attributes = [b"user.one", b"user.empty", b"trusted.long", b"trusted.d", b"trusted.s", b"user.none", b"", b"none", b"user." + b"n" * 300]
descriptors = [os.open(name, flags) for name in ("file", "directory") for flags in (os.O_RDONLY, os.O_PATH)] + [999]

def said(reads, call, *arguments):
    try:
        found = getattr(reads, call)(*arguments)
    except OSError as error:
        return type(error), error.errno, error.strerror
    except ValueError:
        return ValueError
    if call in ("lstat", "fstat"):
        return found and [getattr(found, f"st_{field}") for field in FIELDS]
    if call == "open_regular":
        opened = os.fstat(found).st_ino, os.get_inheritable(found), os.get_blocking(found)
        os.close(found)
        return opened
    return list(found.items()) if call == "scan" else found

asked = [(call, here, name) for call in ("lstat", "readlink", "listxattr") for name in names]
asked += [("open_regular", here, name, os.O_RDONLY | os.O_NOATIME) for name in names]
asked += [(call, here, name, attribute) for call in ("getxattr", "find_xattr") for name in names for attribute in attributes]
asked += [("fstat", fd) for fd in descriptors]
asked += [("listxattr", fd, b"") for fd in descriptors[:-1]]
asked += [("getxattr", fd, b"", b"user.one") for fd in descriptors[:-1]]
asked += [("find_xattr_of", fd, attribute) for fd in descriptors for attribute in attributes]
many = os.open("many", os.O_RDONLY) if os.mkdir("many") is None else -1
for number in range(3000):
    os.mknod(f"many/{number:0200}", stat.S_IFREG)
asked += [("scan", fd, flags) for fd in (os.open(".", os.O_RDONLY), many, here, descriptors[0], 999) for flags in (0, os.O_NOATIME)]
for question in asked:
    plain = said(PlainReads(), *question)
    ours = said(wire, *question)
    assert plain == ours, (question, plain, ours)
found = wire.lstat_all(here, names[:-2])
assert [said(wire, "lstat", here, name) for name in names[:-2] if name != b"file/below"] == [
    st and [getattr(st, f"st_{field}") for field in FIELDS] for name, st in zip(names, found) if name != b"file/below"]
assert wire.lstat_all(here, [b"file/below"]) == PlainReads().lstat_all(here, [b"file/below"]) == [None]
assert wire.lstat_all(here, []) == [] and wire.lstat_all(-1, [b"file"]) == [None]
for wrong in ((), (here,), (here, "text"), ("text", b"name"), (here, b"name", 1, 2)):
    for call in ("lstat", "readlink", "open_regular", "getxattr", "find_xattr", "find_xattr_of", "listxattr", "lstat_all", "scan"):
        try:
            getattr(wire, call)(*wrong)
        except TypeError:
            continue
        raise AssertionError((call, wrong))
print(len(asked))
"""


@pytest.mark.parametrize(
    ("place", "refused_with"),
    [
        pytest.param("disk", 0, id="disk"),
        pytest.param("memory", 0, id="memory"),
        pytest.param("disk", errno.ENOSYS, id="kernel without getxattrat"),
        pytest.param("disk", errno.EPERM, id="container that refuses it"),
    ],
)
def test_the_extension_reads_what_the_os_module_reads(tmp_path: Path, place: str, refused_with: int) -> None:
    if place == "memory":
        subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    command: list[str | Path] = [sys.executable, "-P", "-c", PROGRAM, tmp_path, str(refused_with)]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    finally:
        if place == "memory":
            subprocess.run(["umount", tmp_path], check=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 300
