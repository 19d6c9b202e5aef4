"""Names of every kind, and trees deeper than a path can say."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tests.posix.check import Step, add, check, fails, file, folder, link, names_in, symlink

NAMES: dict[str, bytes] = {
    "255_bytes": b"n" * 255,
    "252_bytes": b"m" * 252,
    "255_bytes_of_utf_8": "é".encode() * 127 + b"x",
    "no_utf_8": b"\xff\xfe\x80 latin \xe9",
    "a_newline": b"two\nlines",
    "spaces_and_quotes": b" '\"`$(x)\\ ",
    "a_colon_and_comma": b"a:b,c\\:d",
    "an_aufs_whiteout": b".wh.name",
    "an_aufs_opaque_mark": b".wh..wh..opq",
    "the_bare_aufs_prefix": b".wh.",
    "a_kernel_work_file": b"#1a",
    "dots": b"...",
    "a_hidden_work_directory": b".upper.pyoverlay-work",
    "a_fuse_hidden_file": b".fuse_hidden0000000000000001",
}


def _life_of_a_name(name: bytes) -> Step:
    def claim(d: Path) -> None:
        base = os.fsencode(d)
        path = base + b"/" + name
        with open(path, "xb") as made:
            made.write(b"content")
        assert os.listdir(base) == [name]
        with open(path, "rb") as found:
            assert found.read() == b"content"
        os.rename(path, base + b"/plain")
        os.rename(base + b"/plain", path)
        os.link(path, base + b"/linked")
        os.unlink(base + b"/linked")
        os.unlink(path)
        os.mkdir(path)
        with open(path + b"/inside", "xb"):
            pass
        assert os.listdir(path) == [b"inside"]
        os.unlink(path + b"/inside")
        os.rmdir(path)
        os.symlink(name, path)
        assert os.readlink(path) == name
        os.unlink(path)
        assert os.listdir(base) == []

    return claim


def _found(name: bytes) -> Step:
    def claim(d: Path) -> None:
        path = os.fsencode(d) + b"/" + name
        assert os.listdir(os.fsencode(d)) == [name]
        with open(path, "r+b") as found:
            assert found.read() == b"content"
            found.write(b" and more")
        assert os.stat(path).st_size == 16
        os.rename(path, os.fsencode(d) + b"/plain")
        assert os.listdir(os.fsencode(d)) == [b"plain"]
        os.rename(os.fsencode(d) + b"/plain", path)
        os.unlink(path)
        assert os.listdir(os.fsencode(d)) == []
        with fails(errno.ENOENT):
            os.stat(path)

    return claim


def _given(name: bytes) -> Step:
    def make(d: Path) -> None:
        with open(os.fsencode(d) + b"/" + name, "xb") as made:
            made.write(b"content")

    return make


for _what, _name in NAMES.items():
    add(f"a_name_with_{_what}_can_be_used", (), _life_of_a_name(_name))
    # An empty `.wh.NAME` in a lower is a whiteout by the images' convention; these hold content, and stay files.
    if _what != "an_aufs_opaque_mark":
        add(f"a_name_with_{_what}_is_found", (_given(_name),), _found(_name))


@check(file("f"))
def names_differ_by_case(d: Path) -> None:
    with fails(errno.ENOENT):
        os.stat(d / "F")
    (d / "F").write_bytes(b"large")
    assert names_in(d) == ["F", "f"]
    assert (d / "f").read_bytes() == b"old content"


@check(folder("sub"))
def names_longer_than_255_bytes_are_refused(d: Path) -> None:
    for act in (os.stat, os.mkdir, os.unlink, os.rmdir, os.listdir):
        with fails(errno.ENAMETOOLONG):
            act(d / ("n" * 256))
    with fails(errno.ENAMETOOLONG):
        os.stat(d / "/".join(["n" * 200] * 25))
    assert names_in(d) == ["sub"]


def _deep_tree(d: Path) -> None:
    """40 levels of 200 bytes are 8,000: twice what PATH_MAX lets one say in a single call."""
    _descend(d, make=True)


def _descend(d: Path, *, make: bool) -> int:
    fd = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(40):
        if make:
            os.mkdir(b"d" * 200, dir_fd=fd)
        below = os.open(b"d" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    if make:
        bottom = os.open("bottom", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
        os.write(bottom, b"deep")
        os.close(bottom)
        os.close(fd)
        return -1
    return fd


@check(_deep_tree)
def a_tree_deeper_than_path_max_can_be_used(d: Path) -> None:
    fd = _descend(d, make=False)
    try:
        bottom = os.open("bottom", os.O_RDWR, dir_fd=fd)
        assert os.read(bottom, 10) == b"deep"
        os.write(bottom, b" down")
        os.close(bottom)
        os.rename("bottom", "renamed", src_dir_fd=fd, dst_dir_fd=fd)
        os.mkdir("below", dir_fd=fd)
        assert sorted(os.listdir(fd)) == ["below", "renamed"]
        assert os.stat("renamed", dir_fd=fd).st_size == 9
        os.chmod("below", 0o700, dir_fd=fd)
    finally:
        os.close(fd)


@check(_deep_tree)
def a_tree_deeper_than_path_max_can_be_removed(d: Path) -> None:
    import subprocess

    subprocess.run(["rm", "-rf", d / ("d" * 200)], check=True)
    assert names_in(d) == []


@check(folder("sub", file("f", b"inside")), symlink("s", "sub"))
def dots_and_doubled_slashes_lead_where_they_should(d: Path) -> None:
    for path in (f"{d}//sub///f", f"{d}/./sub/./f", f"{d}/sub/../sub/f", f"{d}/s/../sub/f", f"{d}/s/f"):
        with open(path, "rb") as found:
            assert found.read() == b"inside", path


@check(file("f"), link("f", "g"), folder("sub"))
def numbers_are_one_per_object(d: Path) -> None:
    (d / "new").write_bytes(b"x")
    numbers = {name: os.lstat(d / name).st_ino for name in ("f", "g", "sub", "new")}
    assert numbers["f"] == numbers["g"]
    assert len(set(numbers.values())) == 3
    assert len({os.lstat(d / name).st_dev for name in numbers}) == 1
