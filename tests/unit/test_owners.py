"""Ids as stored and as shown: what has a counterpart, and what becomes of the rest."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from pyoverlay.core import attributes
from pyoverlay.core.attributes import Wanted
from pyoverlay.core.owners import Owners
from pyoverlay.core.policy import OVERFLOW, IdRange, Policy
from pyoverlay.testing import Directory, File
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY

# As podman sends it for --userns=keep-id: three ranges that swap the user's own id with root's place.
KEEP_ID = (IdRange(0, 1, 1001), IdRange(1001, 0, 1), IdRange(1002, 1002, 64535))
SHIFTED = (IdRange(0, 100_000, 1000),)


def st(uid: int, gid: int) -> os.stat_result:
    return os.stat_result((0o100644, 1, 1, 1, uid, gid, 0, 0, 0, 0))


def code(act: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        act()
    return errno.errorcode[caught.value.errno or 0]


def test_without_a_map_every_id_is_kept() -> None:
    owners = Owners(Policy())
    assert owners.are_kept
    assert owners.shown(st(0, 4_294_967_294)) == (0, 4_294_967_294)
    assert owners.maker(1, 2) == (1, 2)
    assert owners.shown_acl(b"anything") == owners.stored_acl(b"anything") == b"anything"


@pytest.mark.parametrize(("stored", "shown"), [(0, 1), (1000, 1001), (1001, 0), (1002, 1002), (65536, 65536)])
def test_an_id_and_its_counterpart_lead_to_one_another(stored: int, shown: int) -> None:
    owners = Owners(Policy(uid_map=KEEP_ID, gid_map=KEEP_ID))
    assert owners.shown(st(stored, stored)) == (shown, shown)
    assert owners.maker(shown, shown) == (stored, stored)
    assert owners.are_known(st(stored, stored))


@pytest.mark.parametrize("stored", [1000, 65534, 100_000, 4_294_967_294])
def test_an_id_without_counterpart_shows_as_the_overflow_id(stored: int) -> None:
    owners = Owners(Policy(uid_map=SHIFTED))
    assert owners.shown(st(stored, 7)) == (OVERFLOW, 7)
    assert not owners.are_known(st(stored, 7))


def test_what_the_mount_s_own_user_makes_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4)
    monkeypatch.setattr(os, "getegid", lambda: 100_004)
    owners = Owners(Policy(uid_map=SHIFTED, gid_map=SHIFTED))
    assert owners.maker(4, 100_004) == (4, 4)
    assert code(lambda: owners.maker(4, 5)) == "EOVERFLOW"


@pytest.mark.parametrize("shown", [999, 99_999, 101_000, OVERFLOW])
def test_nobody_is_made_an_owner_who_has_no_counterpart(shown: int) -> None:
    owners = Owners(Policy(uid_map=SHIFTED))
    assert owners.uids.lacks(shown)
    assert code(lambda: owners.maker(shown, 0)) == "EOVERFLOW"
    assert code(lambda: owners.uids.stored(shown)) == "EOVERFLOW"
    assert owners.gids.stored(shown) == shown


def test_where_all_is_squashed_what_is_made_is_the_daemons() -> None:
    owners = Owners(Policy(squash_uid=5))
    assert owners.shown(st(0, 7)) == (5, 7)
    assert owners.maker(99, 99) == (os.geteuid(), os.getegid())
    assert owners.are_known(st(0, 7))


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_an_acl_names_counterparts() -> None:
    owners = Owners(Policy(uid_map=SHIFTED, gid_map=(IdRange(0, 200_000, 1000),)))
    nobody = 0xFFFFFFFF
    stored = acl((1, 6, nobody), (2, 4, 7), (4, 4, nobody), (8, 4, 8), (16, 4, nobody), (32, 0, nobody))
    shown = acl((1, 6, nobody), (2, 4, 100_007), (4, 4, nobody), (8, 4, 200_008), (16, 4, nobody), (32, 0, nobody))
    assert owners.shown_acl(stored) == shown
    assert owners.stored_acl(shown) == stored
    assert owners.shown_acl(acl((2, 4, 5000))) == acl((2, 4, nobody))
    assert code(lambda: owners.stored_acl(acl((2, 4, 7)))) == "EINVAL"
    assert owners.stored_acl(b"no ACL") == b"no ACL"


def test_what_belongs_to_nobody_is_read_and_not_changed(stack: StackFactory) -> None:
    """The errnos are those of the kernel's idmapped mounts."""
    policy = replace(POLICY, uid_map=(IdRange(os.geteuid() + 1, 100_000, 1000),))
    one = stack({"f": "lower", "d": {"g": "below"}}, upper={"u": File("upper", 0o666), "e": Directory({"h": "x"}, 0o777)}, policy=policy)
    before = one.disk_tree()
    merged, view = one.merged, one.merged.view
    assert merged.read("u") == b"upper"
    assert merged.read("f") == b"lower"
    for name in ("f", "u", "e"):
        assert code(partial(merged.chmod, name, 0o600)) == "EOVERFLOW"
        assert code(partial(merged.rename, name, "new")) == "EOVERFLOW"
    u = merged.walk("u")
    assert code(lambda: attributes.setattr(view, u, Wanted(mtime_ns=1))) == "EACCES"
    assert code(lambda: attributes.setattr(view, u, Wanted(size=1))) == "EACCES"
    assert code(lambda: attributes.setattr(view, u, Wanted(gid=1))) == "EOVERFLOW"
    assert code(lambda: attributes.write(view, u, b"x", 0)) == "EACCES"
    assert code(lambda: attributes.setxattr(view, u, b"user.x", b"y")) == "EPERM"
    assert code(lambda: attributes.removexattr(view, u, b"user.x")) == "EPERM"
    assert code(lambda: merged.link("u", "new")) == "EOVERFLOW"
    assert code(lambda: merged.unlink("u")) == "EOVERFLOW"
    assert code(lambda: merged.unlink("f")) == "EOVERFLOW"
    assert code(lambda: merged.unlink("d/g")) == "EOVERFLOW"
    assert code(lambda: merged.mkdir("e/new")) == "EOVERFLOW"
    assert code(lambda: merged.create("d/new")) == "EOVERFLOW"
    assert sorted(os.listdir(one.upper)) == ["e", "u"], "nothing was copied up"
    assert one.disk_tree() == before
