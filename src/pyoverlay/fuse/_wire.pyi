"""The C extension that completes pyfuse3 from outside. Import it through `pyoverlay.fuse.binding`, which may find none.

A *node* is the kernel's number of an inode, which with pyfuse3 is `st_ino`. All functions may be called from any thread, except
`request` and `whole_request`, which belong to the task that handles the request.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypedDict

class LaneCounts(TypedDict):
    """What needed no pyfuse3: requests answered by the receiver, requests given to C threads, requests answered by one plain call of
    Python, and nodes registered now.
    """

    reads: int
    writes: int
    xattrs: int
    isattys: int
    attributes: int
    queued_reads: int
    queued_writes: int
    direct: int
    nodes: int

def serve(
    init: Callable[[bytes, bytes], bytes] | None,
    interrupt: Callable[[int], None] | None,
    opcodes: Iterable[int],
    direct: dict[int, Callable[..., Any]] = ...,
    failed_page: Callable[[int], None] | None = ...,
    /,
) -> None:
    """Say what Python wants of the next session, before it is mounted; forgotten when pyfuse3 closes it.

    `init` gets INIT as the kernel sent it and the reply of libfuse, both with their headers, and returns the reply that is sent.
    `interrupt` gets the `unique` of a request whose caller had a signal, and 0 when the mount is gone. libfuse does not hear of it.
    A request whose opcode is in `opcodes` calls pyfuse3's `read(fh=0, off=0, size=0)`: the handler finds the real one by
    `whole_request()`, and what it returns is the body of the reply. ValueError: an opcode below 0 or above 63.
    `direct` has a function for each opcode that is answered by a plain call, on the thread that receives, before pyfuse3 sees it; it gets
    the request's fields and returns what the reply says, a negative errno, or NotImplemented, which leaves the request to pyfuse3. What
    each gets and returns is in `pyoverlay.fuse.direct`; a function for READ or WRITE registers a lane, as one for
    SETATTR may.
    `failed_page` gets the node of each WRITE of a page that a map had dirtied and that failed, on whatever thread it did; it may not wait.
    """

def request() -> tuple[int, int, int, int, int, int, bytes]:
    """Opcode, unique, node, uid, gid, pid and the first 128 bytes of the body of the request being handled.

    Valid until the handler first suspends. LookupError: there is none.
    """

def whole_request() -> tuple[int, int, int, int, int, int, bytes]:
    """The same with the whole body."""

def lane(node: int, read_fd: int, write_fd: int, links: int = -1, waits: int = 0, server: int = 0, /) -> None:
    """From now on answer READ of `node` from `read_fd` and WRITE by `write_fd`, in C; -1 is none, and leaves them to Python.

    The call waits while the receiver uses the node's descriptors: when it returns, what was registered before may be closed. Requests
    given to C threads use duplicates. WRITE goes to Python all the same if the caller's writing must take suid or sgid away; `write_fd`
    must therefore carry the node's real mode.

    `links`: unless -1, GETATTR is answered by `read_fd` as well, which may then be a directory's, and SETATTR by `write_fd`. What fstat
    says, but for the number, is what the node shows; its links are so many, or with 0 as many as fstat says. A SETATTR that truncates, or
    takes suid or sgid away, goes to Python.

    `waits`: what reading may wait for: 2 nothing, the data are in memory; 1 a disk, and then the receiver may wait itself as long as that
    is quick and nobody else asks for anything; 0 a server that may never answer, and then a thread does. `server`: not 0, a number for who
    has to be asked for the data: reading is left to threads that ask nobody else.
    """

def latency(fd: int, /) -> None:
    """From now on ask through this descriptor of /dev/cpu_dma_latency for processors that stay awake, while requests come in a row; -1: no
    more. It stays the caller's, and what was asked for ends when it is closed. Before the first request only.
    """

def no_xattr(node: int, absent: bool, lists_nothing: bool = False, /) -> None:
    """With `absent`, answer ENODATA for the node's ACLs and security.capability in C, until called with False; with `lists_nothing`,
    LISTXATTR as well, with an empty list.
    """

def written(node: int = 0, /) -> bool:
    """Whether `node` (0: any node) was written through the lane since this was last asked."""

def counts() -> tuple[dict[int, int], LaneCounts]:
    """Requests received in this session by opcode, and those the lane answered. Reply-less FORGETs count as well."""

def is_idle() -> bool:
    """Whether the last receive waited in vain, so that the loop should sleep until the device is readable."""

def hold(change: int, /) -> None:
    """Say that so many more calls, or fewer, are under way in threads, whose ends the loop waits for. While there are none the receiver
    sleeps on the device itself for some milliseconds before it gives the loop its turn.
    """

def is_active() -> bool:
    """Whether pyfuse3 has received through this module since the session began."""

def is_interposed() -> bool:
    """Whether what is loaded from now on binds to this module."""

def finds_libfuse() -> bool:
    """Whether libfuse's own functions are found among the loaded libraries."""

def notify_inval_inode(node: int, offset: int, length: int, /) -> None:
    """Write back and drop the kernel's cached data of `node`; a negative offset drops its attributes only.

    The notifications wait for requests in flight: never call one on the thread that serves. OSError: ENOENT if the kernel does not know
    the node, ENOTCONN if nothing is mounted.
    """

def notify_inval_entry(parent: int, name: bytes, /) -> None:
    """Drop the kernel's entry `name` of the directory `parent`. OSError as above; ValueError: not a file name."""

def notify_prune(nodes: Sequence[int], /) -> None:
    """Ask the kernel to forget `nodes` that nobody uses (protocol 7.45). OSError EINVAL: an older kernel."""

def watch_calls(watch: Callable[[str], int] | None, /) -> None:
    """For tests: from now on `watch` is called right before each system call by which the functions below change an upper or put it on
    disk, with the name of the call in `core.calls`, and before those by which `copy_up_file` reads, with names that are not there. It
    returns 0, or the errno with which that call fails instead of being made.
    """

def copy_up_file(
    source_fd: int,
    dirfd: int,
    name: bytes,
    work_fd: int,
    temporary: bytes,
    new_dirfd: int,
    new: bytes,
    size: int,
    most: int,
    in_memory: bool,
    may_share: bool,
    order: int,
    uid: int,
    gid: int,
    is_nosuid: bool,
    obeys_modes: bool,
    mark_prefix: bytes,
    uuid: bytes,
    /,
) -> tuple[int, int, bool, bool, int] | None:
    """`core.calls.Calls.copy_up_file`, with the fields of a PlainFile."""

def make(dirfd: int, name: bytes, mode: int, caller: tuple[int, int, int], rdev: int, target: bytes, /) -> tuple[int, Stat | None]:
    """`core.calls.Calls.make`. For as long as the one system call takes, the thread has the caller's ids and the process its umask."""

# -- core.reads.Reads

class Stat:
    """What lstat and fstat return: core.syscalls.Stat, and in a reply the kernel's own layout. Nothing else makes one."""

    st_mode: Final[int]
    st_ino: Final[int]
    st_dev: Final[int]
    st_nlink: Final[int]
    st_uid: Final[int]
    st_gid: Final[int]
    st_size: Final[int]
    st_blocks: Final[int]
    st_blksize: Final[int]
    st_rdev: Final[int]
    st_atime_ns: Final[int]
    st_mtime_ns: Final[int]
    st_ctime_ns: Final[int]

def lstat(dirfd: int, name: bytes, /) -> Stat | None: ...
def lstat_all(dirfd: int, names: list[bytes], /) -> list[Stat | None]: ...
def fstat(fd: int, /) -> Stat: ...
def readlink(dirfd: int, name: bytes, /) -> bytes: ...
def open_regular(dirfd: int, name: bytes, flags: int, /) -> int: ...
def getxattr(dirfd: int, name: bytes, attribute: bytes, /) -> bytes: ...
def find_xattr(dirfd: int, name: bytes, attribute: bytes, /) -> bytes | None: ...
def find_xattr_of(fd: int, attribute: bytes, /) -> bytes | None: ...
def listxattr(dirfd: int, name: bytes, /) -> list[bytes]: ...
def scan(dirfd: int, flags: int, /) -> dict[bytes, int]: ...
