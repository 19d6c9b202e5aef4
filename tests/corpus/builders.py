"""Layers as others make them: the kernel's overlay, `tar` and a shell. Each builder makes directories below `base` and returns them, the
top one first.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyoverlay.testing import HardLink, Tree, make_tree
from tests.posix.kernel_overlay import KernelOverlay

Layers = tuple[Path, ...]

BASE: Tree = {
    "bin": {"tool": "tool", "link": HardLink("bin/tool")},
    "doc": {"a": "a", "b": "b", "deep": {"c": "c"}},
    "etc": {"conf": "conf", "old": "old", "keep.d": {"1": "1", "2": "2"}},
    "var": {"big": "data" * 5000, "log": {"1": "log"}},
}


@contextmanager
def _kernel(base: Path, name: str, *lowers: Path) -> Iterator[Path]:
    """The merged view of the kernel's overlay, with a new upper of that name."""
    for directory in (base / name, base / "merged"):
        directory.mkdir(exist_ok=True)
    overlay = KernelOverlay(lowers, base / name, base / "merged", ("redirect_dir=on", "metacopy=on", "index=on", "xino=on"))
    overlay.mount()
    try:
        yield base / "merged"
    finally:
        overlay.umount()


def by_the_kernel(base: Path) -> Layers:
    """Two uppers of the kernel's over a plain directory, with all that it writes: whiteouts, opaque directories, redirects by name and by
    path, metacopy files under other names, links of an index, the origins of it all.
    """
    bottom = base / "bottom"
    bottom.mkdir()
    make_tree(bottom, BASE)
    with _kernel(base, "first", bottom) as merged:
        (merged / "etc" / "old").unlink()
        subprocess.run(["rm", "-r", merged / "etc" / "keep.d"], check=True)
        (merged / "etc" / "keep.d").mkdir()
        (merged / "etc" / "keep.d" / "new").write_text("new")
        (merged / "doc" / "deep").rename(merged / "doc" / "deeper")
        (merged / "var" / "big").chmod(0o600)
        (merged / "var" / "big").rename(merged / "doc" / "big")
        (merged / "bin" / "link").write_text("both")
    with _kernel(base, "second", base / "first", bottom) as merged:
        (merged / "doc").rename(merged / "etc" / "doc")
        os.chown(merged / "etc" / "doc" / "big", 7, 7)
        (merged / "etc" / "doc" / "deeper" / "c").write_text("changed")
        (merged / "etc" / "keep.d" / "new").unlink()
        (merged / "var" / "log" / "1").unlink()
        (merged / "var" / "log").rmdir()
        (merged / "var" / "log").write_text("a file now")
    return base / "second", base / "first", bottom


def nested_in_the_kernels(base: Path) -> Layers:
    """A layer that was made inside a kernel's overlay: its marks are escaped once by that, and mean something to nobody outside."""
    bottom = base / "bottom"
    bottom.mkdir()
    make_tree(bottom, {"d": {"below": "below"}, "f": "f"})
    with _kernel(base, "outer", bottom) as merged:
        os.setxattr(merged / "d", "trusted.overlay.opaque", b"y")
        os.setxattr(merged / "f", "trusted.overlay.metacopy", b"")
    return base / "outer", bottom


def _unpacked(base: Path, name: str, *members: tuple[str, str | None]) -> Path:
    """What GNU tar makes of an archive: directories, where the content is None, and files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in members:
            member = tarfile.TarInfo(path)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))
    (base / name).mkdir()
    subprocess.run(["tar", "-x", "-C", base / name], input=packed.getvalue(), check=True)
    return base / name


def by_tar(base: Path) -> Layers:
    """Layers of an image, unpacked as they are: `.wh.` files in them."""
    top = _unpacked(
        base, "top", ("etc", None), ("etc/.wh.old", ""), ("doc", None), ("doc/.wh..wh..opq", ""), ("doc/new", "new"), (".wh.var", ""),
        ("not.wh.a", "is shown"), (".wh.full", "a file that is not empty is no whiteout"),
    )  # fmt: skip
    middle = _unpacked(base, "middle", ("etc", None), ("etc/old", "hidden"), ("etc/mine", "mine"), ("var", None), ("var/.wh.big", ""))
    bottom = base / "bottom"
    bottom.mkdir()
    make_tree(bottom, BASE)
    return top, middle, bottom


SCRIPT = r"""
mkdir -p top/a/b top/opaque top/x top/moved bottom/a/b bottom/opaque bottom/x bottom/from/deep bottom/data
mknod top/a/whiteout c 0 0
setfattr -n trusted.overlay.opaque -v y top/opaque
setfattr -n trusted.overlay.opaque -v x top/x
touch top/x/gone top/x/empty
setfattr -n trusted.overlay.whiteout -v y top/x/gone
setfattr -n trusted.overlay.redirect -v /from top/moved
mknod top/from c 0 0
echo own > top/moved/own
truncate -s 4096 top/copy
chmod 640 top/copy
setfattr -n trusted.overlay.metacopy top/copy
setfattr -n trusted.overlay.redirect -v /data/file top/copy
ln -s /nowhere top/a/b/symlink
echo below > bottom/a/whiteout
echo below > bottom/a/b/below
echo below > bottom/opaque/hidden
echo below > bottom/x/gone
echo below > bottom/x/empty
echo deep > bottom/from/deep/file
head -c 4096 /dev/zero | tr '\0' d > bottom/data/file
"""


def by_hand(base: Path) -> Layers:
    """What overlayfs.rst says, typed."""
    subprocess.run(["sh", "-ec", SCRIPT], cwd=base, check=True)
    return base / "top", base / "bottom"
