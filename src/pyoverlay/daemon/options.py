r"""The option language: what follows `-o`, as the kernel's overlay, mount(8) and the container engines spell it.

Pure functions from strings to one frozen `Options`; nothing here looks at the machine. The rules of spelling are the kernel's
(fs/overlayfs/params.c: `\` keeps the next character from ending an option or a layer) and mount(8)'s (an SELinux context may
stand in double quotes). Three kinds of option are told apart: those that do something, those that change nothing here and are
passed over, and those that are refused, by name, because they are unknown, malformed, or wished for but not there yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pyoverlay.core.policy import Fsync, IdRange, Override, Policy, RedirectDir, Uuid, Verity, Whiteouts
from pyoverlay.errors import OptionRefused

MAX_LOWERS = 4096
DEFAULT_STOP_TIMEOUT = 90.0
DEFAULT_INODES = 1_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What a mount was asked for. Paths are bytes as given, neither made absolute nor looked at.

    data_lowers: layers that show nothing but data of metacopy files. suid, dev, allow_other, redirect_dir, userxattr: None where the caller
    left the choice to the privileges of the mount. stop_timeout: seconds that a mount which was told to end serves its last users. given:
    every option as written, for people.
    """

    lowers: tuple[bytes, ...] = ()
    data_lowers: tuple[bytes, ...] = ()
    upper: bytes | None = None
    work: bytes | None = None
    read_only: bool = False
    suid: bool | None = None
    dev: bool | None = None
    exec: bool = True
    noatime: bool = False
    nodiratime: bool = False
    sync: bool = False
    dirsync: bool = False
    source: str | None = None
    subtype: str = "pyoverlay"
    allow_other: bool | None = None
    redirect_dir: RedirectDir | None = None
    userxattr: bool | None = None
    metacopy: bool = False
    index: bool = False
    uuid: Uuid = Uuid.NULL
    rename_copy_limit: int = 1 << 30
    verity: Verity = Verity.OFF
    fsync: Fsync = Fsync.ORDERED
    whiteouts: Whiteouts = Whiteouts.AUTO
    writeback: bool = False
    cpu_latency: bool | None = None  # None: as `latency` sees fit
    inodes: int | None = None  # DEFAULT_INODES
    squash_uid: int | None = None
    squash_gid: int | None = None
    uid_map: tuple[IdRange, ...] = ()
    gid_map: tuple[IdRange, ...] = ()
    override: Override = Override.NONE
    stop_timeout: float = DEFAULT_STOP_TIMEOUT
    given: tuple[str, ...] = ()


def parse(strings: Iterable[str]) -> Options:
    """The options of one or more `-o` strings; a later one wins over an earlier one.

    Raises OptionRefused for the first one that is unknown, has a wrong value, contradicts another, or is not implemented.
    """
    given = tuple(option for string in strings for option in split(string))
    fields: dict[str, Any] = {}
    lowers: list[bytes] = []
    data_lowers: list[bytes] = []
    for option in given:
        name, equals, value = option.partition("=")
        if name == "lowerdir":
            lowers, data_lowers = map(list, lowerdirs(value))
        elif name == "datadir+":
            data_lowers.append(_path(name, value))
        elif name == "lowerdir+":
            if data_lowers:
                raise OptionRefused(option, "comes after data-only layers; name the layers that show first")
            lowers.append(_path(name, value))
        else:
            fields.update(_meaning(option, name, value if equals else None))
    fields |= {"lowers": tuple(lowers), "data_lowers": tuple(data_lowers)}
    return _consistent(Options(**fields, given=given))


def with_directories(options: Options, *, lowers: str | None = None, upper: str | None = None, work: str | None = None) -> Options:
    """`options` with the layers that were given as arguments: `lowers` as `A:B`, `upper` and `work` as plain paths."""
    if lowers is not None:
        shown, data_only = lowerdirs(lowers)
        options = replace(options, lowers=shown, data_lowers=(*data_only, *options.data_lowers))
    if upper is not None:
        options = replace(options, upper=_path("upperdir", upper, escaped=False))
    if work is not None:
        options = replace(options, work=_path("workdir", work, escaped=False))
    return _consistent(options)


def policy(options: Options, *, privileged: bool, overflow_is_mapped: bool = False) -> Policy:
    """What the core is told. Without privilege over the initial user namespace marks are `user.overlay.*` (fact: trusted is EPERM).

    OptionRefused: index=on without privilege.
    """
    if options.index and not privileged:
        raise OptionRefused("index=on", "finds lower files by their handles, which root alone may open; leave it out")
    return Policy(
        userxattr=not privileged if options.userxattr is None else options.userxattr,
        redirect_dir=options.redirect_dir or RedirectDir.ON,
        metacopy=options.metacopy,
        index=options.index,
        uuid=options.uuid,
        rename_copy_limit=options.rename_copy_limit,
        verity=options.verity,
        whiteouts=options.whiteouts,
        fsync=options.fsync,
        privileged=privileged,
        overflow_is_mapped=overflow_is_mapped,
        squash_uid=options.squash_uid,
        squash_gid=options.squash_gid,
        uid_map=options.uid_map,
        gid_map=options.gid_map,
        override=options.override,
    )


# One option: everything up to a comma that no backslash precedes. Quotes mean something in an SELinux context and nowhere else:
# in a path they are ordinary characters.
_OPTION = re.compile(r'((?:fs|def|root)?context="[^"]*"|(?:[^\\,]+|\\.|\\\Z)*)(?:,|\Z)', re.DOTALL)
_LAYER = re.compile(r"((?:[^\\:]+|\\.|\\\Z)*)(:|\Z)", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def split(string: str) -> list[str]:
    """The options in one `-o` string, backslashes kept; empty ones, as engines send them, are dropped."""
    return [option for option in _OPTION.findall(string) if option]


def lowerdirs(value: str) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The layers of `A:B::C::D`, top first: those that show, and the data-only ones, each after a `::`."""
    parts = value.split(":") if "\\" not in value else _colon_separated(value)
    shown = parts[: parts.index("")] if "" in parts else parts
    rest = parts[len(shown) :]
    if not shown or "" in rest[1::2] or any(rest[::2]) or len(rest) % 2:
        reason = "an empty path among the layers; write A:B, or A::D for a data-only layer below, and `\\:` for a colon in a name"
        raise OptionRefused("lowerdir", reason)
    if len(parts) - len(rest) // 2 > MAX_LOWERS:
        raise OptionRefused("lowerdir", f"{len(parts) - len(rest) // 2} layers; at most {MAX_LOWERS} are taken")
    return tuple(_path("lowerdir", part) for part in shown), tuple(_path("lowerdir", part) for part in rest[1::2])


def _colon_separated(value: str) -> list[str]:
    parts = []
    for part, separator in _LAYER.findall(value):
        parts.append(part)
        if not separator:  # the end; a further, empty match would follow
            break
    return parts


def escape(path: bytes) -> str:
    """`path` as it is written in a `lowerdir=` of an option string: the inverse of `split` and `lowerdirs` together."""
    return re.sub(r"([\\:,])", r"\\\1", os.fsdecode(path))


def _path(name: str, value: str, *, escaped: bool = True) -> bytes:
    path = _ESCAPE.sub(r"\1", value) if escaped and "\\" in value else value
    if not path:
        raise OptionRefused(name, "an empty path")
    if "\0" in path:
        raise OptionRefused(name, "a path cannot hold a NUL byte")
    return os.fsencode(path)


# ── what each option says ───────────────────────────────────────────────────────────────────────────────────────────────────

# What mount(8), fstab and the engines send that changes nothing here. default_permissions is always on; credentials are the daemon's
# with either spelling of override_creds; a directory has one link whatever is asked.
_HARMLESS = (
    *("default_permissions", "override_creds", "nooverride_creds", "static_nlink"),
    *("defaults", "private", "rprivate", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group", "_netdev"),
)

_FLAGS: dict[str, dict[str, Any]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "suid": {"suid": True},
    "nosuid": {"suid": False},
    "dev": {"dev": True},
    "nodev": {"dev": False},
    "exec": {"exec": True},
    "noexec": {"exec": False},
    "atime": {"noatime": False},
    "noatime": {"noatime": True},
    "relatime": {"noatime": False},
    "diratime": {"nodiratime": False},
    "nodiratime": {"nodiratime": True},
    "sync": {"sync": True},
    "async": {"sync": False},
    "dirsync": {"dirsync": True},
    "allow_other": {"allow_other": True},
    "userxattr": {"userxattr": True},
    "volatile": {"fsync": Fsync.VOLATILE},
    "writeback": {"writeback": True},
    "squash_to_root": {"squash_uid": 0, "squash_gid": 0},
    **{name: {} for name in _HARMLESS},
}

_IGNORED_VALUES = frozenset({"context", "fscontext", "defcontext", "rootcontext", "user", "comment", "threaded"})

Meaning = Callable[[str, str], dict[str, Any]]


def _one_of(field: str, values: dict[str, Any]) -> Meaning:
    def meaning(name: str, value: str) -> dict[str, Any]:
        if value not in values:
            raise OptionRefused(f"{name}={value}", f"no such value; it is one of {', '.join(values)}")
        return {field: values[value]}

    return meaning


def _only(harmless: tuple[str, ...], missing: tuple[str, ...], reason: str) -> Meaning:
    """An option of which only the values that ask for nothing are there."""

    def meaning(name: str, value: str) -> dict[str, Any]:
        if value in missing:
            raise OptionRefused(f"{name}={value}", f"not implemented: {reason}")
        if value not in harmless:
            raise OptionRefused(f"{name}={value}", f"no such value; it is one of {', '.join((*harmless, *missing))}")
        return {}

    return meaning


def _number(field: str) -> Meaning:
    def meaning(name: str, value: str) -> dict[str, Any]:
        if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) > 0xFFFFFFFE:
            raise OptionRefused(f"{name}={value}", "wants an id, a number from 0 to 4294967294")
        return {field: int(value)}

    return meaning


def _seconds(name: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", value):
        raise OptionRefused(f"{name}={value}", "wants a number of seconds")
    return float(value)


def _size(field: str) -> Meaning:
    def meaning(name: str, value: str) -> dict[str, Any]:
        found = re.fullmatch(r"([0-9]{1,15})([KMG]?)", value, re.IGNORECASE)
        if found is None:
            raise OptionRefused(f"{name}={value}", "wants a number of bytes, with K, M or G after it for the larger units")
        return {field: int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]}

    return meaning


def _timeout(name: str, value: str) -> dict[str, Any]:
    # fuse-overlayfs's own default is 1e9, "for ever", and that is what happens here.
    if _seconds(name, value) < 1e9:
        raise OptionRefused(f"{name}={value}", "not implemented: what the kernel has read stays valid as long as the mount lives")
    return {}


_IDS = 0xFFFFFFFF  # the last of them, -1, is nobody's


def _id_map(field: str) -> Meaning:
    """`[:]CONTAINER:HOST:LENGTH[:…]`, as containers/storage sends it: in the layers ids are the container's, in the view the host's."""

    def meaning(name: str, value: str) -> dict[str, Any]:
        numbers = value.removeprefix(":").split(":")
        if len(numbers) % 3 or not all(re.fullmatch(r"[0-9]{1,10}", number) for number in numbers):
            raise OptionRefused(f"{name}={value}", "wants CONTAINER:HOST:LENGTH triples of numbers")
        triples = zip(*[map(int, numbers)] * 3, strict=True)
        ranges = tuple(IdRange(*triple) for triple in triples)
        if any(not length or max(stored, shown) + length > _IDS for stored, shown, length in ranges):
            raise OptionRefused(f"{name}={value}", f"a range is empty, or goes past the last id, {_IDS - 1}")
        if _overlap((stored, length) for stored, _, length in ranges) or _overlap((shown, length) for _, shown, length in ranges):
            raise OptionRefused(f"{name}={value}", "ranges overlap: an id would have two counterparts")
        return {field: ranges}

    return meaning


def _overlap(ranges: Iterable[tuple[int, int]]) -> bool:
    """Do any two of these (first, length) have an id in common?"""
    ordered = sorted(ranges)
    return any(first + length > second for (first, length), (second, _) in pairwise(ordered))


def _text(field: str) -> Meaning:
    def meaning(name: str, value: str) -> dict[str, Any]:
        text = _ESCAPE.sub(r"\1", value)
        if not text or "\0" in text:
            raise OptionRefused(f"{name}=", "wants a name")
        return {field: text}

    return meaning


def _subtype(name: str, value: str) -> dict[str, Any]:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise OptionRefused(f"{name}={value}", "wants letters, digits and `.-_`")
    return {"subtype": value}


def _inodes(name: str, value: str) -> dict[str, Any]:
    if not value.isdecimal() or not 1000 <= int(value) < 1 << 32:
        raise OptionRefused(f"{name}={value}", "wants a number of at least 1000")
    return {"inodes": int(value)}


_FSYNC = {"ordered": Fsync.ORDERED, "strict": Fsync.STRICT, "volatile": Fsync.VOLATILE, "0": Fsync.VOLATILE, "1": Fsync.ORDERED}

_VALUES: dict[str, Meaning] = {
    "upperdir": lambda name, value: {"upper": _path(name, value)},
    "workdir": lambda name, value: {"work": _path(name, value)},
    "fsname": _text("source"),
    "subtype": _subtype,
    "redirect_dir": _one_of("redirect_dir", {mode.value: mode for mode in RedirectDir}),
    "fsync": _one_of("fsync", _FSYNC),
    "whiteouts": _one_of("whiteouts", {mode.value: mode for mode in Whiteouts}),
    "squash_to_uid": _number("squash_uid"),
    "squash_to_gid": _number("squash_gid"),
    "stop_timeout": lambda name, value: {"stop_timeout": _seconds(name, value)},
    "timeout": _timeout,
    "uidmapping": _id_map("uid_map"),
    "gidmapping": _id_map("gid_map"),
    # Inode numbers are unique and lasting without it, whatever it says.
    "xino": _only(("on", "off", "auto"), (), ""),
    "uuid": _one_of("uuid", {mode.value: mode for mode in Uuid}),
    "rename_copy_limit": _size("rename_copy_limit"),
    "index": _one_of("index", {"on": True, "off": False}),
    "metacopy": _one_of("metacopy", {"on": True, "off": False}),
    "verity": _one_of("verity", {mode.value: mode for mode in Verity}),
    "nfs_export": _only(("off",), ("on",), "file handles do not outlive the mount"),
    "xattr_permissions": _one_of("override", {mode.value: mode for mode in Override}),
    "writeback": _one_of("writeback", {"on": True, "off": False, "1": True, "0": False}),
    "cpu_latency": _one_of("cpu_latency", {"on": True, "off": False, "auto": None}),
    "inodes": _inodes,
}

_NOT_YET = {
    "noacl": "ACLs are always enforced",
    "noxattrs": "extended attributes are always there",
    "remount": "a live mount keeps its layers and options; unmount it and mount anew",
}


def _meaning(option: str, name: str, value: str | None) -> dict[str, Any]:
    if name.lower().startswith("x-"):
        return {}
    if value is None:
        if name in _FLAGS:
            return _FLAGS[name]
        if name in _NOT_YET:
            raise OptionRefused(name, f"not implemented: {_NOT_YET[name]}")
        raise OptionRefused(option, "wants a value" if name in _VALUES else "unknown option")
    if name in _IGNORED_VALUES:
        return {}
    if name in _NOT_YET and name not in _VALUES:
        raise OptionRefused(name, f"not implemented: {_NOT_YET[name]}")
    if name not in _VALUES:
        raise OptionRefused(option, "takes no value" if name in _FLAGS else "unknown option")
    return _VALUES[name](name, value)


def _consistent(options: Options) -> Options:
    if options.upper is None and options.work is not None:
        raise OptionRefused("workdir", "there is no upperdir to go with it; add upperdir=, or leave workdir= out for a read-only mount")
    if options.userxattr and options.redirect_dir in (RedirectDir.ON, RedirectDir.FOLLOW):
        raise OptionRefused(
            f"redirect_dir={options.redirect_dir.value}", "contradicts userxattr: a redirect that any user may write is never followed"
        )
    if options.userxattr and (options.metacopy or options.verity is not Verity.OFF or options.data_lowers):
        option = "metacopy=on" if options.metacopy else f"verity={options.verity.value}" if options.verity is not Verity.OFF else "datadir+"
        raise OptionRefused(option, "contradicts userxattr: a metacopy mark that any user may write is never followed")
    if options.metacopy and options.redirect_dir not in (None, RedirectDir.ON):
        reason = "contradicts metacopy=on, which finds the data of a renamed file by a redirect"
        raise OptionRefused(f"redirect_dir={options.redirect_dir.value}", reason)
    return options
