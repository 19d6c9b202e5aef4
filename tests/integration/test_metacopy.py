"""Files whose data lie in another layer than their attributes: the kernel's read here, ours read by the kernel, and what one costs."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, Entry, File, MountRefusedError, Overlay, OverlayFactory, Symlink, Tree, Whiteout, snapshot
from pyoverlay.testing.mounts import command
from tests.integration.looks import mark
from tests.integration.test_hardlinks import drop_caches
from tests.posix.check import fails
from tests.posix.kernel_overlay import KernelOverlay

pytestmark = pytest.mark.root

METACOPY, REDIRECT = "trusted.overlay.metacopy", "trusted.overlay.redirect"
DATA = os.urandom(3 << 20)
LOWER: Tree = {"f": DATA, "d": {"in": DATA, "other": "other"}, "one": DATA, "suid": File(DATA, mode=0o4755), "e": ""}
KERNEL = ("metacopy=on", "redirect_dir=on")


def kernel(overlay: Overlay, *options: str) -> KernelOverlay:
    """The kernel's overlay over the same layers, at the same place."""
    return KernelOverlay(overlay.lowers, overlay.writable, overlay.merged, options or KERNEL)


def seen(merged: Path) -> dict[bytes, tuple[Entry, int]]:
    """The tree, with the blocks of each file."""
    return {path: (entry, os.lstat(merged / os.fsdecode(path)).st_blocks) for path, entry in snapshot(merged).items()}


def change_attributes(merged: Path) -> None:
    (merged / "f").chmod(0o600)
    os.chown(merged / "d" / "in", 5, 6)
    os.setxattr(merged / "one", "user.note", b"1")
    os.utime(merged / "suid", ns=(1, 2))
    (merged / "new").mkdir()
    (merged / "f").rename(merged / "new" / "f")
    os.link(merged / "d" / "in", merged / "linked")
    (merged / "d").rename(merged / "moved")


def test_the_kernels_are_read_and_written(overlay: OverlayFactory) -> None:
    here = overlay(LOWER, mount=False)
    with_kernel = kernel(here)
    with_kernel.mount()
    change_attributes(here.merged)
    expected = seen(here.merged)
    with_kernel.umount()
    here.mount()
    assert seen(here.merged) == expected
    drop_caches()
    with (here.merged / "new" / "f").open("r+b") as file:
        file.write(b"changed")
    assert (here.merged / "new" / "f").read_bytes() == b"changed" + DATA[7:]
    here.umount()
    with_kernel.mount()
    assert (here.merged / "new" / "f").read_bytes() == b"changed" + DATA[7:]
    with_kernel.umount()


def test_ours_are_read_by_the_kernel_and_copy_no_data(overlay: OverlayFactory) -> None:
    here = overlay(LOWER, options=("-o", "metacopy=on"))
    change_attributes(here.merged)
    expected = seen(here.merged)
    for path in ("new/f", "moved/in", "one", "suid"):
        assert mark(here.writable / path, METACOPY) == b"", path
        assert os.lstat(here.writable / path).st_blocks <= 8, path
    assert (mark(here.writable / "new" / "f", REDIRECT), mark(here.writable / "linked", REDIRECT)) == (b"/f", b"/d/in")
    here.remount()
    assert seen(here.merged) == expected
    here.umount()
    with_kernel = kernel(here)
    with_kernel.mount()
    read_back = seen(here.merged)
    with_kernel.umount()
    assert read_back == expected


def test_one_that_is_being_read_shows_its_own_attributes(overlay: OverlayFactory) -> None:
    """The descriptor at hand is of the lower's data, and is not to be asked for a mode that was changed above."""
    here = overlay(LOWER, options=("-o", "metacopy=on"))
    path = here.merged / "suid"
    with path.open("rb") as file:
        file.read(1)
        os.chown(path, 5, 6)
        path.chmod(0o600)
        os.setxattr(path, "user.note", b"1")  # the kernel asks for the attributes anew
        st = os.stat(path)
        assert (oct(st.st_mode), st.st_uid, st.st_gid) == (oct(0o100600), 5, 6)


def test_10_gib_change_owner_and_mode_without_a_byte_of_them(overlay: OverlayFactory, tmp_path: Path) -> None:
    here = overlay({}, options=("-o", "metacopy=on"), mount=False)
    here.lowers = (tmp_path / "lower",)  # one that nobody reads from end to end afterwards
    here.lower.mkdir()
    with (here.lower / "big").open("wb") as file:
        file.write(b"start")
        file.truncate(10 << 30)
    here.mount()
    (here.merged / "big").chmod(0o600)
    os.chown(here.merged / "big", 1, 1)
    assert os.lstat(here.writable / "big").st_blocks <= 8
    assert mark(here.writable / "big", METACOPY) == b""
    assert (here.merged / "big").stat().st_size == 10 << 30
    with (here.merged / "big").open("rb") as file:
        assert file.read(5) == b"start"


@pytest.mark.parametrize("way", ["write", "truncate", "O_TRUNC", "fallocate", "copy_file_range"])
def test_before_its_data_change_it_gets_them(overlay: OverlayFactory, way: str) -> None:
    here = overlay(LOWER, {}, options=("-o", "metacopy=on"))
    path = here.merged / "suid"
    path.chmod(0o4711)
    assert mark(here.writable / "suid", METACOPY) == b""
    expected = bytearray(DATA)
    fd = os.open(path, os.O_RDWR | (os.O_TRUNC if way == "O_TRUNC" else 0))
    try:
        reader = mmap.mmap(fd, len(DATA), prot=mmap.PROT_READ) if way != "O_TRUNC" else None
        match way:
            case "write":
                os.pwrite(fd, b"changed", 100)
                expected[100:107] = b"changed"
            case "truncate":
                os.ftruncate(fd, 1 << 20)
                del expected[1 << 20 :]
            case "O_TRUNC":
                expected.clear()
            case "fallocate":
                os.posix_fallocate(fd, 0, 4 << 20)
                expected += bytes(1 << 20)
            case "copy_file_range":
                source = os.open(here.merged / "d" / "in", os.O_RDONLY)
                os.copy_file_range(source, fd, 4096, 0, 8192)
                os.close(source)
                expected[8192 : 8192 + 4096] = DATA[:4096]
        assert path.read_bytes() == expected
        if reader is not None:
            length = min(len(expected), len(DATA))
            assert reader[:length] == expected[:length]
            reader.close()
    finally:
        os.close(fd)
    assert mark(here.writable / "suid", METACOPY) is None
    here.umount()
    plain = kernel(here, "metacopy=off")
    plain.mount()
    assert path.read_bytes() == expected
    plain.umount()


def test_an_fsync_of_one_makes_its_attributes_durable(overlay: OverlayFactory) -> None:
    here = overlay(LOWER, options=("-o", "metacopy=on"))
    (here.merged / "f").chmod(0o600)
    fd = os.open(here.merged / "f", os.O_RDONLY)
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    assert mark(here.writable / "f", METACOPY) == b""


def metacopy(redirect: bytes | None = None, value: bytes = b"") -> File:
    return File("", size=len(DATA), xattrs={METACOPY: value} | ({} if redirect is None else {REDIRECT: redirect}))


# What `ls` sees of each, as the kernel has it; redirects that could leave the root are the kernel's EIO, and ours EINVAL.
SPOILT: Tree = {
    "fine": "fine",
    "nowhere": metacopy(),
    "whiteout below": metacopy(),
    "short mark": metacopy(b"/data", b"\0"),
    "random redirect": metacopy(b"\xff\1\n"),
    "empty redirect": metacopy(b""),
    "two slashes": metacopy(b"/d//data"),
    "a path without a root": metacopy(b"d/data"),
    "circle": metacopy(b"circle"),
    "long": metacopy(b"/" + b"x" * 300),
    "dir": Directory({}, xattrs={REDIRECT: b""}),
}
BELOW: Tree = {"data": DATA, "d": {"data": DATA}, "whiteout below": Whiteout()}


def looked_at(merged: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in os.listdir(merged):
        try:
            found[name] = os.lstat(merged / name).st_size
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def test_a_refused_entry_answers_its_errno_and_the_listing_works(overlay: OverlayFactory) -> None:
    """A listing asks for the attributes of each entry; one that could not say them took the whole listing down."""
    here = overlay(SPOILT, BELOW, read_only=True, mount=False)
    log = here.merged.parent / "log"
    here.options = ("--log-file", str(log))
    here.mount()
    ours = looked_at(here.merged)
    listed = subprocess.run(["ls", "-l", here.merged], capture_output=True, text=True, check=False)
    assert listed.stdout.count("?????????") == len(SPOILT) - 1 - ("data" in SPOILT)
    assert " fine" in listed.stdout
    assert " d\n" in listed.stdout
    assert looked_at(here.merged) == ours
    here.umount()
    lines = [line for line in log.read_text().splitlines() if "in the merged view" in line]
    assert len(lines) == len(SPOILT) - 1
    layers = ":".join(str(lower) for lower in here.lowers)
    subprocess.run(["mount", "-t", "overlay", "-o", f"lowerdir={layers},metacopy=on", "none", here.merged], check=True)
    try:
        theirs = looked_at(here.merged)
    finally:
        subprocess.run(["umount", here.merged], check=True)
    assert ours == theirs


def test_an_upper_with_a_spoilt_file_can_be_listed_and_used(overlay: OverlayFactory) -> None:
    """The kernel cannot list such an upper's directory at all."""
    here = overlay(BELOW, upper=SPOILT)
    assert {"fine", "nowhere", "circle"} <= set(os.listdir(here.merged))
    with fails(errno.EIO):
        os.stat(here.merged / "nowhere")
    (here.merged / "fine").write_text("changed")
    here.remount()
    assert (here.merged / "fine").read_text() == "changed"


DATA_ONLY: Tree = {"shown": metacopy(b"/a/b/data"), "lost": metacopy(b"/a/none"), "link": metacopy(b"/link"), "relative": metacopy(b"data")}


@pytest.mark.parametrize("spelling", ["lowerdir", "datadir"])
def test_data_only_layers_show_nothing_but_data_that_a_redirect_names(overlay: OverlayFactory, spelling: str) -> None:
    here = overlay(DATA_ONLY, {"a": {}}, {"a": {"b": {"data": DATA}}, "data": DATA, "link": Symlink("data")}, mount=False)
    top, *data_only = here.lowers
    layers = f"{top}::{data_only[0]}::{data_only[1]}"
    ours = layers if spelling == "lowerdir" else f"{top},datadir+={data_only[0]},datadir+={data_only[1]}"

    def results() -> dict[str, object]:
        found: dict[str, object] = {}
        for name in sorted(os.listdir(here.merged)):
            try:
                found[name] = (here.merged / name).read_bytes() == DATA
            except OSError as error:
                found[name] = error.errno
        return found

    subprocess.run(command("mount", "-o", f"lowerdir={ours}", here.merged), check=True)
    try:
        mine = results()
        assert (here.merged / "lost").stat().st_size == len(DATA)
    finally:
        subprocess.run(command("umount", here.merged), check=True)
    subprocess.run(["mount", "-t", "overlay", "-o", f"lowerdir={layers},metacopy=on", "none", here.merged], check=True)
    theirs = results()
    subprocess.run(["umount", here.merged], check=True)
    assert mine == theirs
    assert mine["shown"] is True


def test_with_user_marks_metacopies_are_eperm_and_the_options_contradict(overlay: OverlayFactory) -> None:
    here = overlay({"f": File("", size=9000, xattrs={"user.overlay.metacopy": b""}), "g": "g"}, {"f": DATA}, options=("-o", "userxattr"))
    assert sorted(os.listdir(here.merged)) == ["f", "g"]
    with fails(errno.EPERM):
        (here.merged / "f").read_bytes()
    with pytest.raises(MountRefusedError, match="contradicts userxattr"):
        overlay({}, options=("-o", "userxattr,metacopy=on"))


def test_a_digest_that_nothing_vouches_for_is_eio(overlay: OverlayFactory) -> None:
    digest = struct.pack("BBBB", 0, 36, 0, 1) + bytes(32)
    tree: Tree = {"digest": metacopy(b"/data", digest), "none": metacopy(b"/data"), "plain": "plain"}
    for verity, refused in (("off", set[str]()), ("on", {"digest"}), ("require", {"digest", "none"})):
        here = overlay(tree, {"data": DATA}, options=("-o", f"verity={verity}"))
        for name in tree:
            if name in refused:
                with fails(errno.EIO):
                    (here.merged / str(name)).read_bytes()
            else:
                (here.merged / str(name)).read_bytes()
