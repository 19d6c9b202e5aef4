"""What the daemon may still do once it has mounted: of root's capabilities those that its work needs, and never more again.

A table with the reason of each, and the test that shows it, is in docs/security.md. All sets are those of a thread, so this runs in the
main thread before there is another.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from pyoverlay.core import syscalls
from pyoverlay.core.syscalls import Capabilities


class Capability(IntEnum):
    """Numbers of include/uapi/linux/capability.h."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    LINUX_IMMUTABLE = 9
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    MKNOD = 27
    SETFCAP = 31


# Reading any file and its marks, without leaving an atime; taking the mount away again.
TO_READ = frozenset({Capability.DAC_READ_SEARCH, Capability.FOWNER, Capability.SYS_ADMIN})
# What callers do in the merged view, done in the upper: the kernel has checked that they may.
TO_WRITE = TO_READ | {
    Capability.CHOWN,
    Capability.DAC_OVERRIDE,
    Capability.FSETID,
    Capability.SETGID,
    Capability.SETUID,
    Capability.LINUX_IMMUTABLE,
    Capability.MKNOD,
    Capability.SETFCAP,
}
# Permitted, but in effect only for the moment in which somebody is named who keeps the mount busy.
TO_LOOK = frozenset({Capability.SYS_PTRACE})


def drop(*, writes: bool) -> None:
    """Keep what a mount needs, let go of the rest in every set, and rule out that a program run by us would have more.

    writes: there is an upper. Without a capability to begin with (an ordinary user) there is only the ruling out.
    """
    kept = TO_WRITE if writes else TO_READ
    now = syscalls.capget()
    if now.effective & _bits(frozenset({Capability.SETPCAP})):
        _narrow_bounding_set(kept | TO_LOOK)
    syscalls.clear_ambient_set()
    syscalls.capset(Capabilities(now.effective & _bits(kept), now.permitted & _bits(kept | TO_LOOK), 0))
    # Who unmounts for an ordinary user, by a set-user-id program, was started before.
    syscalls.set_no_new_privileges()
    if os.geteuid() == 0:
        syscalls.set_dumpable(False)  # a core file would hold what callers wrote; setfsuid(2) clears it sooner or later anyway


@contextmanager
def looking_at_processes() -> Iterator[None]:
    """Inside, what the processes of others hold open can be read, as far as it ever could."""
    now = syscalls.capget()
    syscalls.capset(now._replace(effective=now.effective | now.permitted & _bits(TO_LOOK)))
    try:
        yield
    finally:
        syscalls.capset(now)


def _bits(capabilities: frozenset[Capability]) -> int:
    return sum(1 << capability for capability in capabilities)


def _narrow_bounding_set(kept: frozenset[Capability]) -> None:
    for number in range(64):
        try:
            is_there = syscalls.has_in_bounding_set(number)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last that this kernel knows
                return
            raise
        if is_there and number not in kept:
            syscalls.drop_from_bounding_set(number)
