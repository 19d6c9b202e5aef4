"""The live mounts: one JSON file each, `/run/pyoverlay/ID.json`, or `$XDG_RUNTIME_DIR/pyoverlay/ID.json` of an ordinary user.

The daemon writes its file before it says that it is ready and removes it at its end, both through a directory descriptor that it
holds, since /run may by then lie below its own mount. Everybody else reads. A file whose process is gone is stale: pid and start
time together name a process for good, a pid alone comes back. A daemon that could not sync its upper at the end leaves its file
with `failure` in it, for `pyoverlay umount` to report.

Beside it, `ID.sock` is where the daemon tells its counts: whoever connects gets one JSON object and the end (daemon/control.py answers,
report/asking.py asks). A daemon that takes the connection and says nothing hangs.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pyoverlay.core.policy import Policy

SUFFIX = ".json"
SOCKET_SUFFIX = ".sock"

_IS_RECORD = re.compile(r"[0-9a-f]{12}\.json")
_LATEST = 253_402_300_799  # seconds since 1970, the last that a datetime has
_LARGEST = 64 << 20  # 4096 layers with the longest paths there are, and room


@dataclass(frozen=True, slots=True)
class Record:
    """One mount. Paths are absolute, without symlinks, as they were when it was made; lowers top first.

    start_time: of process `pid`, in clock ticks since boot (proc_pid_stat(5), field 22). device: the mount's `major:minor`. started:
    seconds since 1970. data_lowers: layers that show nothing but data of metacopy files. features: the mount's policy, as `Policy.plain`
    gives it, and what else is on or off. failure: why the daemon's last sync failed, None while all is well. owner: the uid to whom the
    file belongs that it was read from.
    """

    id: str
    pid: int
    start_time: int
    device: str
    merged: bytes
    lowers: tuple[bytes, ...]
    upper: bytes | None
    work: bytes | None
    options: tuple[str, ...]
    started: float
    data_lowers: tuple[bytes, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    owner: int | None = field(default=None, compare=False)

    @property
    def policy(self) -> Policy:
        """What the core was told. ValueError: a choice of a later release."""
        return Policy.from_plain(self.features)

    def may_be_of(self, user_id: bytes | None) -> bool:
        """Whether it can be the record of a mount that shows this `user_id=` in mountinfo, None where it shows none.

        Anybody can write down anything in a runtime directory of one's own; who made a mount is the kernel's word.
        """
        return user_id is None or self.owner is None or int(user_id) == self.owner

    @property
    def is_alive(self) -> bool:
        """Its daemon still runs."""
        return start_time(self.pid) == self.start_time


def new_id() -> str:
    """Twelve hexadecimal digits, as container engines name things."""
    return secrets.token_hex(6)


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if there is none, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped process `pid`: it answers nobody."""
    return _state(pid) in (b"T", b"t")


def has_ended(pid: int) -> bool:
    """Whether process `pid` has exited. Threads of it that the kernel cannot end may be left."""
    return _state(pid) in (b"", b"Z", b"X")


def _state(pid: int) -> bytes:
    """The state of a process's first thread, proc_pid_stat(5); empty: there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return b""


def own_directory() -> str:
    """Where this user's mounts are listed. $PYOVERLAY_RUNTIME_DIR overrides it."""
    if override := os.environ.get("PYOVERLAY_RUNTIME_DIR"):
        return override
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return "/run/pyoverlay"
    # Without a session there is no XDG_RUNTIME_DIR; root of a user namespace has no /run it may write to.
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"{runtime}/pyoverlay" if runtime else f"/tmp/pyoverlay-{os.geteuid()}"


def readable_directories() -> list[str]:
    """Every directory of records that this user may read: for root also those of other users.

    A user's own may be two: a mount that was made outside of a session is listed elsewhere than those that were made in it.
    """
    own = own_directory()
    if "PYOVERLAY_RUNTIME_DIR" in os.environ:
        return [own]
    if os.geteuid() != 0:
        others = [f"/run/user/{os.geteuid()}/pyoverlay", f"/tmp/pyoverlay-{os.geteuid()}"]
    else:
        others = [*glob.glob("/run/user/*/pyoverlay"), *glob.glob("/tmp/pyoverlay-*")]
    return [own, *(other for other in others if other != own)]


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of one of these directories. FileNotFoundError, PermissionError: there is none, or not for this user.

    What is read and removed in it is named by this descriptor: its owner may put a symlink in its place at any time, and root looks in.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise FileNotFoundError(errno.ENOENT, "no directory", path) from error
        raise
    try:
        if os.geteuid() not in (0, os.fstat(fd).st_uid):
            raise PermissionError(errno.EPERM, "belongs to another user", path)
        yield fd
    finally:
        os.close(fd)


def open_directory() -> int:
    """A descriptor of `own_directory`, made if missing, mode 0700. PermissionError: it is somebody else's."""
    path = own_directory()
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise PermissionError(1, "belongs to another user, or others may write to it", path)
    return fd


def located(record: Record, device: str) -> Record:
    """The record of a mount that has just got its device number."""
    return replace(record, device=device)


def write(directory: int, record: Record) -> None:
    """Publish or replace a record: readers see the old one or the new one, whole."""
    content = json.dumps(_texts(record)).encode()
    temporary = f".{record.id}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.rename(temporary, record.id + SUFFIX, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(temporary, dir_fd=directory)
        raise


def remove(directory: int, record: Record) -> None:
    """Take a record out; nothing happens if it is gone."""
    with suppress(FileNotFoundError):
        os.unlink(record.id + SUFFIX, dir_fd=directory)


def leave_failure(directory: int, record: Record, failure: str) -> None:
    """Keep the record of a daemon that is about to end, with the reason why its last sync failed."""
    write(directory, replace(record, failure=failure))


def records() -> list[Record]:
    """The records of every directory this user may read, oldest first, stale ones among them."""
    found: list[Record] = []
    for directory in _directories():
        found.extend(_in_directory(directory))
    return sorted(found, key=lambda record: record.started)


def live() -> list[Record]:
    """The records whose daemon runs. Stale ones without a failure to report are cleared away, where this user may."""
    alive = []
    for record in records():
        if record.is_alive:
            alive.append(record)
        elif record.failure is None:
            clear(record)
    return alive


def clear(record: Record) -> None:
    """Remove the record of a daemon that is gone, wherever it lies. Another user's, who may have given any id, takes no other with it."""
    for directory in _directories():
        for suffix in (SUFFIX, SOCKET_SUFFIX):
            with suppress(FileNotFoundError, PermissionError):
                name = record.id + suffix
                if record.owner in (None, os.stat(name, dir_fd=directory, follow_symlinks=False).st_uid):
                    os.unlink(name, dir_fd=directory)


def _directories() -> Iterator[int]:
    """Descriptors of `readable_directories`, each closed when the next is asked for."""
    for path in readable_directories():
        with suppress(FileNotFoundError, PermissionError), opened(path) as directory:
            yield directory


def _in_directory(directory: int) -> Iterator[Record]:
    for name in os.listdir(directory):
        # FileNotFoundError: its daemon ended meanwhile. The others: no record, or one of a release that wrote less.
        if _IS_RECORD.fullmatch(name):
            with suppress(FileNotFoundError, PermissionError, ValueError, KeyError, TypeError):
                yield _read(directory, name)


def _read(directory: int, name: str) -> Record:
    """The record in a file. Another user's directory may hold anything, and root reads it: ValueError for what is no record."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise ValueError("no record") from error
        raise
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise ValueError("no record")
        try:
            record = _record(json.load(file))
        except RecursionError:  # lists in lists in lists
            raise ValueError("no record") from None
    if record.id != name.removesuffix(SUFFIX) or not _is_sound(record):
        raise ValueError("no record")
    return replace(record, owner=status.st_uid)


def _is_sound(record: Record) -> bool:
    """Whether it is made of what a daemon writes down. TypeError: its features are nothing of the kind."""
    with suppress(ValueError):  # a choice of a later release is for whoever asks for the policy
        _ = record.policy
    texts = (record.device, "" if record.failure is None else record.failure, *record.options)
    paths = (record.merged, record.upper or b"/", record.work or b"/", *record.lowers, *record.data_lowers)
    return (
        (type(record.pid), type(record.start_time)) == (int, int)
        and record.pid > 0
        and type(record.started) in (int, float)
        and 0 <= record.started <= _LATEST
        and all(isinstance(text, str) for text in texts)
        and all(path.startswith(b"/") and b"\0" not in path for path in paths)
        and record.lowers != ()
    )


def _texts(record: Record) -> dict[str, Any]:
    return {name: _text(value) for name, value in asdict(record).items() if name != "owner"}


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return [_text(item) for item in value] if isinstance(value, tuple) else value


def _record(texts: dict[str, Any]) -> Record:
    texts["merged"] = os.fsencode(texts["merged"])
    for name in ("upper", "work"):
        texts[name] = None if texts[name] is None else os.fsencode(texts[name])
    for name in ("lowers", "data_lowers"):
        texts[name] = tuple(map(os.fsencode, texts.get(name, ())))
    texts["options"] = tuple(texts["options"])
    texts.setdefault("features", {})  # a daemon of an earlier release
    return Record(**{field.name: texts[field.name] for field in fields(Record) if field.name != "owner"})
