"""What a person reads: a class is a sentence and an exit code.

Core raises OSError and nothing else; what reaches a terminal or a log is one of these, one line each. A class carries two exit
codes: the command line's (`exit_code`: 1 refused, 2 usage) and that of the mount(8) program (`mount_status`: 1 usage or
permission, 2 system error, 32 refused).
"""

from __future__ import annotations

import os


def printable(text: str | bytes) -> str:
    r"""`text` as it can stand in one line: control characters and bytes that are no UTF-8 become `\xNN`."""
    decoded = os.fsdecode(text)
    if decoded.isprintable():
        return decoded
    return "".join(c if c.isprintable() else _escaped(c) for c in decoded)


def _escaped(character: str) -> str:
    # Bytes of a name that are no UTF-8 are these surrogates; the others can come from JSON alone.
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))


class PyoverlayError(Exception):
    """Something that a person asked for and cannot have. `str()` is the line they read, without the program's name."""

    exit_code: int = 1
    mount_status: int = 32


class Refusal(PyoverlayError):
    """`PATH: reason (errno text); remedy`.

    path: what it is about, as the caller spelled it. reason: why not. errno: the system's word for it, None where there is none.
    remedy: what to do instead, None where there is nothing to do.
    """

    def __init__(self, path: str | bytes, reason: str, errno: int | None = None, remedy: str | None = None) -> None:
        self.path = path
        self.reason = reason
        self.errno = errno
        self.remedy = remedy
        super().__init__(self._line())

    @classmethod
    def of(cls, error: OSError, path: str | bytes, remedy: str | None = None) -> Refusal:
        """The refusal that says what the system said, about `path` unless the error names a file itself."""
        named = error.filename if isinstance(error.filename, str | bytes) else path
        return cls(named, "refused by the system", error.errno, remedy)

    def _line(self) -> str:
        line = f"{printable(self.path)}: {printable(self.reason)}"
        if self.errno is not None:
            line += f" ({os.strerror(self.errno)})"
        if self.remedy is not None:
            line += f"; {printable(self.remedy)}"
        return line


class NoPrivilege(Refusal):
    """The caller may not mount. mount(8) tells this from other refusals by its status."""

    mount_status = 1


class OptionRefused(PyoverlayError):
    """An `-o` option or value that is unknown, malformed, or not there yet."""

    mount_status = 1

    def __init__(self, option: str, reason: str) -> None:
        self.option = option
        self.reason = reason
        super().__init__(f"-o {printable(option)}: {reason}")


class UsageError(PyoverlayError):
    """The command line itself is wrong."""

    exit_code = 2
    mount_status = 1


class DaemonFailed(PyoverlayError):
    """The daemon ended, or did not answer in time, without giving a reason of its own."""

    mount_status = 2


class Reported(PyoverlayError):
    """A line that the daemon sent to its caller, with the codes of the refusal that it raised there."""

    def __init__(self, line: str, *, exit_code: int, mount_status: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code
        self.mount_status = mount_status
