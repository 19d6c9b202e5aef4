"""Import, mount, export and commit by an ordinary user, and by root of a user namespace: nothing of it needs root."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.unprivileged import AS_NAMESPACE_ROOT, as_user
from tests.unit.archives import archive, directory, file, saved_image

pytestmark = pytest.mark.root  # makes the user's directory, and what the user may not keep

LAYER = (directory(b"d"), file(b"gone/x", b"x"), file(b"o/old", b"old"))
BASE = archive(*LAYER, file(b"d/f", b"base", mode=0o4755))
TOP = archive(file(b".wh.gone"), directory(b"o"), file(b"o/.wh..wh..opq"), file(b"o/new", b"new"))

ROUND = """
    lowers=$($po import image.tar store)
    $po mount "$lowers" upper merged
    (cd merged; find . | sort; stat -c "%a %U" d/f; echo more > d/more; rm d/f; rm -r o; mkdir o)
    $po export merged | tar -t
    $po commit --mtime 0 merged out:1 > id
    $po umount merged
    mkdir upper2
    $po mount "$($po import out store2)" upper2 merged
    (cd merged; find . | sort)
    $po umount merged
"""

CHANGED = "d/\nd/.wh.f\nd/more\no/\no/.wh..wh..opq\n" + ".\n./d\n./d/more\n./o\n"


def test_an_ordinary_user_owns_everything_and_no_program_runs_as_its_owner_for_everybody(home: Path) -> None:
    (home / "image.tar").write_bytes(archive(*saved_image([BASE, TOP])))
    result = as_user(home, ROUND)
    said = "pyoverlay: without the set-id bits or capabilities that only root can keep: 1\n"  # at the import, and again of the commit
    assert (result.returncode, result.stderr) == (0, said * 2)
    assert result.stdout == ".\n./d\n./d/f\n./o\n./o/new\n755 nobody\n" + CHANGED


def test_root_of_a_namespace_keeps_what_its_ids_allow(home: Path) -> None:
    (home / "image.tar").write_bytes(archive(*saved_image([BASE, TOP])))
    result = as_user(home, f"{AS_NAMESPACE_ROOT} '{ROUND}'")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ".\n./d\n./d/f\n./o\n./o/new\n4755 root\n" + CHANGED
    (home / "layer.tar").write_bytes(archive(file(b"f", uid=7, gid=8)))
    refused = as_user(home, f"{AS_NAMESPACE_ROOT} '$po import layer.tar store'")
    assert (refused.returncode, refused.stdout) == (1, "")
    reason = "its owner, 7:8, is nobody in this user namespace; import it in one that maps these ids, or as an ordinary user"
    assert refused.stderr == f"pyoverlay: layer.tar: f: {reason}\n"
