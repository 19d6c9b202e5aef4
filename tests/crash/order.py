"""The system calls of each operation, in order, as docs/reliability.md has them: `python -m tests.crash.order` writes them there anew."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from pyoverlay.core.syscalls import RENAME_EXCHANGE, RENAME_WHITEOUT
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View
from tests.crash.cases import ALL
from tests.crash.judges import Bed
from tests.unit.merged import Faulty

SHOWN = {
    "create a file": "create",
    "create where a whiteout is": "create_over_a_whiteout",
    "create where a whiteout is, in a setgid directory": "create_over_a_whiteout_in_a_setgid_directory",
    "mkdir": "mkdir",
    "mkdir where a whiteout is": "mkdir_over_a_whiteout",
    "symlink where a whiteout is": "symlink_over_a_whiteout",
    "link over a whiteout, of a lower's file": "link_over_a_whiteout",
    "write to a lower's file": "write_to_a_lower_file",
    "write to an upper file": "write_to_an_upper_file",
    "truncate a lower's file": "truncate_of_a_lower_file",
    "chmod of a lower's file": "chmod_of_a_lower_file",
    "chmod of a lower's file, of which two names are known": "chmod_of_a_lower_file_with_two_names",
    "utimensat of a lower's symlink": "utime_of_a_lower_symlink",
    "chmod of a lower's directory, two deep": "chmod_of_a_lower_directory",
    "unlink of a lower's file": "unlink_of_a_lower_file",
    "unlink of a copied-up file": "unlink_of_a_copied_up_file",
    "unlink of an upper file": "unlink_of_an_upper_file",
    "rmdir of a lower's directory": "rmdir_of_a_lower_directory",
    "rmdir of a merged directory": "rmdir_of_a_merged_directory",
    "rename of an upper file over a lower's": "rename_of_an_upper_file_over_a_lower_file",
    "rename of a lower's file": "rename_of_a_lower_file",
    "rename of a lower's directory": "rename_of_a_lower_directory",
    "rename of an upper directory over a whiteout": "rename_of_an_upper_directory_over_a_whiteout",
    "rename of a merged directory over one that holds whiteouts": "rename_of_a_merged_directory_over_an_emptied_one",
    "exchange of two lower directories": "exchange_of_two_lower_directories",
}
BEGIN, END = "<!-- calls: written by `python -m tests.crash.order` -->\n", "<!-- end of calls -->\n"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_FLAGS = {0: "", RENAME_EXCHANGE: " EXCHANGE", RENAME_WHITEOUT: " WHITEOUT"}


class Recorded(Faulty):
    """Writes down each call, and whether it works in the work directory (w) or the upper (u)."""

    def __init__(self, upper: Upper) -> None:
        super().__init__(0, AssertionError())
        self.lines: list[str] = []
        self._work_fd = upper.work_fd
        self._inner = os.fstat(upper.work_fd).st_ino

    def _call(self, call: Callable[..., object], *arguments: object) -> object:
        if call.__name__ == "ficlone":
            raise OSError(errno.EOPNOTSUPP, "the table shows a file system that shares no blocks")
        self.lines.append(self._line(call.__name__, arguments))
        if call.__name__ == "sync_file_range":
            return None  # nothing here is to survive anything
        return super()._call(call, *arguments)

    def _line(self, name: str, arguments: tuple[object, ...]) -> str:
        match name, arguments:
            case (("rename" | "link"), (old, _, new, _, *rest)):
                flags = _FLAGS[rest[0]] if rest and isinstance(rest[0], int) else ""
                return f"{name} {self._place(old)}→{self._place(new)}{flags}"
            case (("setxattr" | "removexattr"), (dirfd, _, bytes(attribute), *_)):
                return f"{name} {self._place(dirfd)} {os.fsdecode(attribute).rpartition('.')[2]}"
            case (("chmod" | "chown" | "utimens"), (dirfd, *_)):
                return f"{name} {self._place(dirfd)}"
            case (("open" | "mkdir" | "mknod" | "symlink" | "unlink" | "rmdir"), (*_, dirfd)):
                return f"{name} {self._place(dirfd)}"
        return name

    def _place(self, dirfd: object) -> str:
        assert isinstance(dirfd, int)
        return "w" if self._work_fd == dirfd or "/work/work" in os.readlink(f"/proc/self/fd/{dirfd}") else "u"


def sequence(bed: Bed, name: str) -> list[str]:
    """The calls of one case."""
    case = bed.case = ALL[name]
    bed.renew()
    merged = bed.view()
    try:
        case.prepare(merged)
        merged.view.upper.can_make_devices()  # the first whiteout of a mount is made once and linked from then on
        recorded = merged.view.upper.calls = Recorded(_keeping_order(merged.view))
        case.act(merged)
        return list(recorded.lines)
    finally:
        merged.view.close()


def _keeping_order(view: View) -> Upper:
    """As on ext4 with a journal, wherever this runs."""
    view.upper.keeps_order, view.upper.is_memory = True, False
    return view.upper


def table(directory: Path) -> str:
    """The table, in Markdown."""
    bed = Bed(directory)
    rows = [f"| {title} | {', '.join(sequence(bed, name))} |\n" for title, name in SHOWN.items()]
    return "| Operation | Calls |\n|---|---|\n" + "".join(rows)


def written(page: str) -> str:
    """The table that a page has between its marks."""
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        old = PAGE.read_text()
        PAGE.write_text(old.replace(BEGIN + written(old), BEGIN + table(Path(place))))
