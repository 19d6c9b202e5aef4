"""What a mount was asked to do: the choices that change what the core writes or believes.

Values only. Where each comes from (option strings, defaults, privileges) is the daemon's business; the core is handed a finished
Policy and never looks at the machine to make up its mind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple


class RedirectDir(Enum):
    """`redirect_dir=`: Documentation/filesystems/overlayfs.rst, "Renaming directories"."""

    ON = "on"  # followed and written
    FOLLOW = "follow"  # followed, not written: renaming a lower directory is EXDEV
    NOFOLLOW = "nofollow"  # neither followed nor written
    OFF = "off"  # not written; followed, as kernels with REDIRECT_ALWAYS_FOLLOW do

    @property
    def is_followed(self) -> bool:
        return self is not RedirectDir.NOFOLLOW


class Whiteouts(Enum):
    """`whiteouts=`: which spellings of a whiteout count. What is made here is always the kernel's."""

    AUTO = "auto"  # the kernel's, and empty `.wh.NAME` files in lowers
    KERNEL = "kernel"  # the kernel's alone: `.wh.NAME` is an ordinary file
    AUFS = "aufs"  # as AUTO, in the upper too, where then no name may begin with `.wh.`


class Fsync(Enum):
    """`fsync=`: when data must be on disk."""

    ORDERED = "ordered"  # a copy-up's data before its name; durability when somebody calls fsync
    STRICT = "strict"  # as ORDERED with a full fsync before each name, and on close
    VOLATILE = "volatile"  # never


class Override(Enum):
    """`xattr_permissions=`: whether owners and modes of files and directories are kept in an extended attribute, and in which."""

    NONE = "0"
    PRIVILEGED = "1"
    CONTAINERS = "2"

    @property
    def attribute(self) -> bytes | None:
        """Its name."""
        names = {Override.PRIVILEGED: b"security.fuseoverlayfs.override_stat", Override.CONTAINERS: b"user.containers.override_stat"}
        return names.get(self)


OVERFLOW = 65534  # DEFAULT_OVERFLOWUID of <linux/highuid.h>: whoever has no id here shows as this one


class IdRange(NamedTuple):
    """`length` ids, from `stored` on in the layers, from `shown` on in the merged view."""

    stored: int
    shown: int
    length: int


class Uuid(Enum):
    """`uuid=`: whether this overlay has an identity on disk, the mark `uuid` of the upper's root."""

    OFF = "off"  # and file handles are kept without that of their file system, for one that gets another by being copied
    NULL = "null"  # none
    AUTO = "auto"  # the one that is there, or, in an upper that is new, as ON
    ON = "on"  # one is made where there is none


class Verity(Enum):
    """`verity=`: what is asked of the fs-verity digest that a metacopy file demands of its data."""

    OFF = "off"  # not looked at
    ON = "on"  # demanded and not there: EIO
    REQUIRE = "require"  # as ON, and a metacopy file that demands none is EIO


@dataclass(frozen=True, slots=True)
class Policy:
    """The choices of one mount.

    userxattr: marks are `user.overlay.*` instead of `trusted.overlay.*`; redirect and metacopy marks are then never followed.
    read_only: there is no upper.
    privileged: the process has the capabilities a mount of the initial user namespace gives (layers are cloned, owners are set).
    overflow_is_mapped: in our user namespace the overflow id is somebody's, so who shows as it may be unmapped or not.
    uid_map, gid_map: ranges that do not overlap, on neither side; none: ids are kept.
    metacopy: a change of attributes alone copies no data up. verity: see there.
    rename_copy_limit: bytes that renaming a directory of a lower may copy where, for `user.` marks, it cannot be redirected.
    squash_uid, squash_gid: every object belongs to this id in the merged view; None: ids are kept.
    """

    userxattr: bool = False
    redirect_dir: RedirectDir = RedirectDir.ON
    metacopy: bool = False
    verity: Verity = Verity.OFF
    uuid: Uuid = Uuid.NULL
    index: bool = False
    whiteouts: Whiteouts = Whiteouts.AUTO
    fsync: Fsync = Fsync.ORDERED
    rename_copy_limit: int = 1 << 30
    privileged: bool = True
    overflow_is_mapped: bool = False
    squash_uid: int | None = None
    squash_gid: int | None = None
    uid_map: tuple[IdRange, ...] = ()
    gid_map: tuple[IdRange, ...] = ()
    override: Override = Override.NONE

    def plain(self) -> dict[str, Any]:
        """The choices as JSON can hold them, for `from_plain`."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Policy:
        """The policy that `plain` was made of. What it does not name is as in a Policy(); other names are passed over.

        ValueError: a choice that this release does not know.
        """
        chosen: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in plain:
                value = plain[field.name]
                chosen[field.name] = _chosen(field.default, value)
        return cls(**chosen)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return [list(ids) for ids in value] if isinstance(value, tuple) else value


def _chosen(default: Any, value: Any) -> Any:
    """A field's value from JSON: by its default it is known what it is."""
    if isinstance(default, Enum):
        return type(default)(value)
    return tuple(IdRange(*triple) for triple in value) if default == () else value
