"""INIT: which flags go to the kernel, as a function of what it offers and what libfuse answered."""

import struct

import pytest

from pyoverlay.fuse.capabilities import DEFAULT, InitFlag, Wanted, agreed, init_reply, offered

EVERYTHING = (1 << 43) - 1
LIBFUSE = InitFlag.ATOMIC_O_TRUNC | InitFlag.HANDLE_KILLPRIV | InitFlag.ASYNC_DIO


def init_request(flags: int = EVERYTHING) -> bytes:
    body = struct.pack("<5I11I", 7, 45, 131072, flags & 0xFFFFFFFF, flags >> 32, *[0] * 11)
    return struct.pack("<IIQQIIII", 40 + len(body), 26, 2, 0, 0, 0, 0, 0) + body


def init_answer(flags: int = LIBFUSE, *, error: int = 0, max_write: int = 1 << 20) -> bytes:
    body = struct.pack("<4I2H2I2HI28x", 7, 38, 131072, flags & 0xFFFFFFFF, 12, 9, max_write, 1, 1, 0, flags >> 32)
    return struct.pack("<IiQ", 16 + len(body), error, 2) + body


def fields(reply: bytes) -> dict[str, int]:
    names = ["major", "minor", "readahead", "flags", "background", "congestion", "max_write", "time_gran", "pages", "alignment", "flags2"]
    return dict(zip(names, struct.unpack_from("<16x4I2H2I2HI", reply), strict=True))


def test_default_flags_are_all_set_where_the_kernel_offers_all() -> None:
    assert agreed(init_reply(init_request(), init_answer(), Wanted())) & DEFAULT == DEFAULT


def test_a_flag_the_kernel_does_not_offer_stays_off() -> None:
    reply = init_reply(init_request(EVERYTHING & ~InitFlag.HANDLE_KILLPRIV_V2), init_answer(), Wanted())
    assert not agreed(reply) & InitFlag.HANDLE_KILLPRIV_V2


def test_o_trunc_stays_out_of_an_open_that_is_never_sent() -> None:
    assert not agreed(init_reply(init_request(), init_answer(), Wanted())) & InitFlag.ATOMIC_O_TRUNC
    with_open = Wanted(on=DEFAULT & ~InitFlag.NO_OPEN_SUPPORT)
    assert agreed(init_reply(init_request(), init_answer(), with_open)) & InitFlag.ATOMIC_O_TRUNC


def test_the_second_killpriv_replaces_the_first() -> None:
    flags = agreed(init_reply(init_request(), init_answer(), Wanted()))
    assert flags & InitFlag.HANDLE_KILLPRIV_V2
    assert not flags & InitFlag.HANDLE_KILLPRIV


@pytest.mark.parametrize(
    "flag",
    [
        InitFlag.SETXATTR_EXT,
        InitFlag.SECURITY_CTX,
        InitFlag.CREATE_SUPP_GROUP,
        InitFlag.READDIRPLUS_AUTO,
        InitFlag.OVER_IO_URING,
        InitFlag.PASSTHROUGH,
    ],
)
def test_a_flag_that_libfuse_could_not_parse_is_refused_even_if_asked_for(flag: InitFlag) -> None:
    assert not agreed(init_reply(init_request(), init_answer(flags=flag), Wanted(on=flag))) & flag


def test_what_is_wanted_off_is_off() -> None:
    assert not agreed(init_reply(init_request(), init_answer(), Wanted(off=InitFlag.ASYNC_DIO))) & InitFlag.ASYNC_DIO


def test_background_requests_are_bounded_by_what_is_wanted() -> None:
    reply = fields(init_reply(init_request(), init_answer(), Wanted(max_background=1000)))
    assert (reply["background"], reply["congestion"]) == (1000, 750)


def test_max_write_stays_libfuses_and_pages_follow_it() -> None:
    reply = fields(init_reply(init_request(), init_answer(max_write=(1 << 20) - 4096 + 1), Wanted()))
    assert reply["max_write"] == (1 << 20) - 4096 + 1
    assert reply["pages"] == 256


def test_no_write_is_longer_than_a_mebibyte_whatever_libfuse_has_room_for() -> None:
    reply = fields(init_reply(init_request(), init_answer(max_write=65535 * 4096), Wanted()))
    assert (reply["max_write"], reply["pages"]) == (1 << 20, 256)


def test_high_flags_need_init_ext() -> None:
    without = init_request(InitFlag.DONT_MASK | InitFlag.DIRECT_IO_ALLOW_MMAP)
    assert offered(without) == InitFlag.DONT_MASK
    assert fields(init_reply(without, init_answer(), Wanted()))["flags2"] == 0
    reply = fields(init_reply(init_request(), init_answer(), Wanted()))
    assert reply["flags"] & InitFlag.INIT_EXT
    assert reply["flags2"] == InitFlag.DIRECT_IO_ALLOW_MMAP >> 32


def test_header_and_length_of_the_reply_are_kept() -> None:
    answer = init_answer()
    reply = init_reply(init_request(), answer, Wanted())
    assert reply[:16] == answer[:16]
    assert len(reply) == len(answer)
    assert fields(reply)["minor"] == 38


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (init_request(), init_answer(error=-71)),
        (init_request(), init_answer()[:40]),
        (init_request(), b""),
        (init_request()[:44], init_answer()),
    ],
    ids=["an error", "an old protocol", "nothing", "a short request"],
)
def test_a_reply_that_cannot_be_read_is_passed_on_as_it_is(request_: bytes, reply: bytes) -> None:
    assert init_reply(request_, reply, Wanted()) == reply
    assert offered(b"") == agreed(b"") == InitFlag(0)
