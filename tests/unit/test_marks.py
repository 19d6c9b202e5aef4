"""Bytes to meaning and back: what overlays write on disk."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyoverlay.core import marks
from pyoverlay.core.marks import Origin, check_redirect, decode_origin, encode_origin, escape_xattr, unescape_xattr
from pyoverlay.core.syscalls import FileHandle
from tests.posix.check import fails

UUID = bytes(range(16))
HANDLE = FileHandle(1, b"\x01\x02\x03\x04\x05\x06\x07\x08")
_LITTLE = sys.byteorder == "little"


def stat_of(mode: int, size: int = 0, rdev: int = 0) -> os.stat_result:
    return os.stat_result((mode, 1, 1, 1, 0, 0, size, 0, 0, 0), {"st_rdev": rdev})


@pytest.mark.parametrize(
    ("st", "is_whiteout"),
    [
        (stat_of(stat.S_IFCHR, rdev=0), True),
        (stat_of(stat.S_IFCHR | 0o777, rdev=0), True),
        (stat_of(stat.S_IFCHR, rdev=os.makedev(1, 3)), False),
        (stat_of(stat.S_IFBLK, rdev=0), False),
        (stat_of(stat.S_IFREG), False),
    ],
)
def test_a_whiteout_is_the_character_device_0_0_whatever_its_mode(st: os.stat_result, is_whiteout: bool) -> None:
    assert marks.is_whiteout_device(st) is is_whiteout


def test_only_an_empty_regular_file_may_be_a_whiteout_file() -> None:
    assert marks.may_be_whiteout_file(stat_of(stat.S_IFREG | 0o644))
    assert not marks.may_be_whiteout_file(stat_of(stat.S_IFREG | 0o644, size=1))
    assert not marks.may_be_whiteout_file(stat_of(stat.S_IFIFO))


def test_an_origin_is_written_as_the_kernel_writes_it() -> None:
    assert encode_origin(Origin(UUID, HANDLE)) == bytes([0, 0xFB, 29, 0 if _LITTLE else 1, 1]) + UUID + HANDLE.data
    assert encode_origin(Origin(UUID, HANDLE, is_upper=True))[3] == (4 if _LITTLE else 5)


@given(st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(max_size=128), st.booleans())
def test_an_origin_is_read_back_as_it_was_written(uuid: bytes, kind: int, data: bytes, is_upper: bool) -> None:
    origin = Origin(uuid, FileHandle(kind, data), is_upper)
    assert decode_origin(encode_origin(origin)) == origin


def changed(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda origin: origin[:place] + bytes([value]) + origin[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        changed(0, 1),
        changed(1, 0xFC),
        changed(2, 30),
        changed(2, 28),
        changed(3, 1 if _LITTLE else 0),
        changed(3, 8),
        lambda origin: origin[:20],
        lambda origin: origin + b"\0",
        lambda _: b"",
    ],
    ids=["later version", "other magic", "longer", "shorter", "other byte order", "unknown flag", "cut", "padded", "origin unknown"],
)
def test_an_origin_that_cannot_be_followed_is_none(spoil: Callable[[bytes], bytes]) -> None:
    assert decode_origin(spoil(encode_origin(Origin(UUID, HANDLE)))) is None


def test_an_origin_of_any_byte_order_is_read_on_every_machine() -> None:
    both = encode_origin(Origin(UUID, HANDLE))
    assert decode_origin(changed(3, 2)(both)) == Origin(UUID, HANDLE)
    assert decode_origin(changed(3, 3)(both)) == Origin(UUID, HANDLE)


@given(st.binary(max_size=64))
def test_any_bytes_are_an_origin_or_none(value: bytes) -> None:
    origin = decode_origin(value)
    assert origin is None or (len(origin.uuid) == 16 and value.endswith(origin.handle.data))


@pytest.mark.parametrize("redirect", [b"name", b"/a", b"/a/b/c", b"...", b"/.a/..b", b"\xff\n"])
def test_a_redirect_is_one_name_or_a_path_from_the_root(redirect: bytes) -> None:
    assert check_redirect(redirect) == redirect


@pytest.mark.parametrize(
    "redirect", [b"", b"/", b"//a", b"/a//b", b"/a/", b"a/b", b"..", b".", b"/..", b"/a/../b", b"/./a", b"a\0b", b"/a\0"]
)
def test_any_other_redirect_is_refused(redirect: bytes) -> None:
    with pytest.raises(OSError, match="invalid redirect") as caught:
        check_redirect(redirect)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("prefix", [marks.TRUSTED, marks.USER])
def test_a_caller_s_own_mark_is_kept_one_level_deeper(prefix: bytes) -> None:
    assert escape_xattr(prefix + b"opaque", prefix) == prefix + b"overlay.opaque"
    assert escape_xattr(prefix + b"overlay.opaque", prefix) == prefix + b"overlay.overlay.opaque"
    assert unescape_xattr(prefix + b"overlay.opaque", prefix) == prefix + b"opaque"
    assert unescape_xattr(prefix + b"opaque", prefix) is None


def test_other_names_are_left_as_they_are() -> None:
    for name in (b"user.note", b"trusted.overlay", b"trusted.overlayfs.x", marks.USER + b"opaque"):
        assert escape_xattr(name, marks.TRUSTED) == name
        assert unescape_xattr(name, marks.TRUSTED) == name


@given(st.sampled_from([marks.TRUSTED, marks.USER]), st.binary(max_size=40), st.booleans())
def test_whatever_a_caller_sets_is_listed_under_the_same_name(prefix: bytes, rest: bytes, is_mark: bool) -> None:
    name = prefix + rest if is_mark else b"user." + rest
    assert unescape_xattr(escape_xattr(name, prefix), prefix) == name


@pytest.mark.parametrize("digest", [None, marks.Digest(1, b"d" * 32), marks.Digest(2, b"d" * 64)])
def test_a_metacopy_mark_is_read_back_as_it_was_written(digest: marks.Digest | None) -> None:
    assert marks.decode_metacopy(marks.encode_metacopy(digest)) == digest


@pytest.mark.parametrize("value", [b"\0", b"\0\3\0", b"\1\4\0\0", b"\0\5\0\0", b"\0\4\0\1d"], ids=bytes.hex)
def test_a_metacopy_mark_of_another_version_or_length_is_eio(value: bytes) -> None:
    with fails(errno.EIO):
        marks.decode_metacopy(value)


def test_a_metacopy_mark_without_an_algorithm_demands_no_digest() -> None:
    assert marks.decode_metacopy(b"\0\4\0\0") is None
