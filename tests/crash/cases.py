"""Operations on a small tree, each with what must be done before it: the matter of the tests that make system calls fail, kill the
process at one of them, or cut the power there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyoverlay.core.attributes import Wanted
from pyoverlay.core.policy import Policy
from pyoverlay.core.syscalls import RENAME_EXCHANGE
from pyoverlay.testing import Fifo, File, HardLink, Symlink, Tree
from tests.unit.merged import IS_ROOT, Merged

Act = Callable[[Merged], object]

LOWER: Tree = {
    "file": File("lower file", mode=0o750, xattrs={"user.note": b"kept"}),
    "other": "another lower file",
    "sparse": File("start", size=1 << 20),
    "link": Symlink("target"),
    "fifo": Fifo(),
    "first": "linked",
    "second": HardLink("first"),
    "directory": {"inside": "inside", "deep": {"bottom": "bottom"}},
    "empty": {},
    "full": {"one": "1", "two": "2"},
}
BELOW: Tree = {"directory": {"below": "below"}, "empty": {}}


def nothing(_: Merged) -> None:
    """No preparation."""


def steps(*acts: Act) -> Act:
    def act(merged: Merged) -> None:
        for one in acts:
            one(merged)

    return act


def emptied(merged: Merged) -> None:
    """A merged directory of the upper that holds whiteouts alone."""
    merged.chmod("full", 0o711)
    merged.unlink("full/one")
    merged.unlink("full/two")


def looked_up_links(merged: Merged) -> None:
    merged.walk("first")
    merged.walk("second")


@dataclass(frozen=True)
class Case:
    act: Act
    prepare: Act = nothing
    is_redirect: bool = False  # renames a directory that a lower has part in, which `user.` marks cannot express
    metacopy: bool = False  # with metacopy=on, which `user.` marks exclude
    index: bool = False  # with index=on, which root alone can have
    userxattr: bool = False  # with `user.` marks, whoever does it

    def policy(self, policy: Policy) -> Policy:
        return replace(policy, metacopy=self.metacopy, index=self.index, userxattr=policy.userxattr or self.userxattr)

    def kernel_options(self) -> tuple[str, ...]:
        """Those by which the kernel's overlay reads what the case has written."""
        if self.userxattr:
            return ("userxattr",)
        return ("redirect_dir=on", f"index={'on' if self.index else 'off'}", "metacopy=on")


CASES = {
    "create": Case(lambda m: m.create("new")),
    "write_to_an_upper_file": Case(lambda m: m.write("new", b"content"), lambda m: m.create("new")),
    "create_in_a_lower_directory": Case(lambda m: m.create("directory/deep/new")),
    "create_over_a_whiteout": Case(lambda m: m.create("file"), lambda m: m.unlink("file")),
    "create_over_a_whiteout_in_a_setgid_directory": Case(
        lambda m: m.create("directory/inside"), steps(lambda m: m.chmod("directory", 0o2775), lambda m: m.unlink("directory/inside"))
    ),
    "mkdir": Case(lambda m: m.mkdir("new")),
    "mkdir_in_a_lower_directory": Case(lambda m: m.mkdir("directory/deep/new")),
    "mkdir_over_a_whiteout": Case(lambda m: m.mkdir("file"), lambda m: m.unlink("file")),
    "mkdir_over_a_directory's_whiteout": Case(lambda m: m.mkdir("empty"), lambda m: m.rmdir("empty")),
    "mkdir_over_a_whiteout_in_a_setgid_directory": Case(
        lambda m: m.mkdir("directory/inside"), steps(lambda m: m.chmod("directory", 0o2775), lambda m: m.unlink("directory/inside"))
    ),
    "symlink": Case(lambda m: m.symlink("target", "new")),
    "symlink_over_a_whiteout": Case(lambda m: m.symlink("target", "file"), lambda m: m.unlink("file")),
    "mkfifo": Case(lambda m: m.mknod("new", stat.S_IFIFO | 0o600)),
    "link_of_a_lower_file": Case(lambda m: m.link("file", "new")),
    "link_of_an_upper_file": Case(lambda m: m.link("new", "newer"), lambda m: m.create("new", b"new")),
    "link_over_a_whiteout": Case(lambda m: m.link("other", "file"), lambda m: m.unlink("file")),
    "link_into_another_directory": Case(lambda m: m.link("file", "directory/deep/new")),
    "unlink_of_a_lower_file": Case(lambda m: m.unlink("file")),
    "unlink_deep_in_a_lower": Case(lambda m: m.unlink("directory/deep/bottom")),
    "unlink_of_an_upper_file": Case(lambda m: m.unlink("new"), lambda m: m.create("new")),
    "unlink_of_a_copied_up_file": Case(lambda m: m.unlink("file"), lambda m: m.chmod("file", 0o600)),
    "rmdir_of_a_lower_directory": Case(lambda m: m.rmdir("empty")),
    "rmdir_of_a_merged_directory": Case(lambda m: m.rmdir("full"), emptied),
    "rmdir_of_an_upper_directory": Case(lambda m: m.rmdir("new"), lambda m: m.mkdir("new")),
    "rmdir_of_an_opaque_directory": Case(lambda m: m.rmdir("empty"), steps(lambda m: m.rmdir("empty"), lambda m: m.mkdir("empty"))),
    "write_to_a_lower_file": Case(lambda m: m.write("file", b"changed")),
    "chmod_of_a_lower_file": Case(lambda m: m.chmod("file", 0o640)),
    "chmod_of_a_sparse_lower_file": Case(lambda m: m.chmod("sparse", 0o640)),
    "chmod_of_a_lower_file_with_two_names": Case(lambda m: m.chmod("first", 0o640), looked_up_links),
    "chmod_of_a_lower_directory": Case(lambda m: m.chmod("directory/deep", 0o700)),
    "chmod_of_an_upper_file": Case(lambda m: m.chmod("new", 0o600), lambda m: m.create("new")),
    "utime_of_a_lower_symlink": Case(lambda m: m.utime("link", 1, 2)),
    "chown_of_a_lower_file": Case(lambda m: m.setattr("file", Wanted(uid=os.geteuid(), gid=os.getegid()))),
    "truncate_of_a_lower_file": Case(lambda m: m.truncate("file", 5)),
    "emptying_of_a_lower_file": Case(lambda m: m.truncate("file", 0)),
    "growth_of_a_lower_file": Case(lambda m: m.truncate("file", 100_000)),
    "truncate_of_an_upper_file": Case(lambda m: m.truncate("new", 2), lambda m: m.create("new", b"content")),
    "chmod_of_a_lower_fifo": Case(lambda m: m.chmod("fifo", 0o600)),
    "setxattr_of_a_lower_directory": Case(lambda m: m.setxattr("directory", "user.new", b"value")),
    "setxattr_of_a_lower_file": Case(lambda m: m.setxattr("file", "user.new", b"value")),
    "removexattr_of_a_lower_file": Case(lambda m: m.removexattr("file", "user.note")),
    "rename_of_a_lower_file": Case(lambda m: m.rename("file", "new")),
    "rename_of_a_lower_file_over_a_lower_file": Case(lambda m: m.rename("file", "other")),
    "rename_of_a_lower_file_over_a_whiteout": Case(lambda m: m.rename("file", "other"), lambda m: m.unlink("other")),
    "rename_of_an_upper_file_over_a_whiteout": Case(
        lambda m: m.rename("new", "other"), steps(lambda m: m.create("new"), lambda m: m.unlink("other"))
    ),
    "rename_of_an_upper_file_over_a_lower_file": Case(lambda m: m.rename("new", "file"), lambda m: m.create("new", b"new")),
    "rename_of_a_file_with_two_names": Case(lambda m: m.rename("first", "directory/third"), looked_up_links),
    "rename_of_a_symlink": Case(lambda m: m.rename("link", "directory/link")),
    "rename_of_an_upper_directory": Case(lambda m: m.rename("new", "newer"), steps(lambda m: m.mkdir("new"), lambda m: m.create("new/in"))),
    "rename_of_an_upper_directory_over_a_whiteout": Case(
        lambda m: m.rename("new", "file"), steps(lambda m: m.mkdir("new"), lambda m: m.unlink("file"))
    ),
    "rename_of_an_upper_directory_over_a_lower_one": Case(lambda m: m.rename("new", "empty"), lambda m: m.mkdir("new")),
    "rename_of_an_upper_directory_over_an_emptied_one": Case(lambda m: m.rename("new", "full"), steps(lambda m: m.mkdir("new"), emptied)),
    "rename_of_an_opaque_directory": Case(
        lambda m: m.rename("empty", "directory/new"), steps(lambda m: m.rmdir("empty"), lambda m: m.mkdir("empty"))
    ),
    "rename_of_a_lower_directory": Case(lambda m: m.rename("directory", "new"), is_redirect=True),
    "rename_of_a_lower_directory_into_another": Case(lambda m: m.rename("directory", "empty/new"), is_redirect=True),
    "rename_of_a_lower_directory_over_a_lower_one": Case(lambda m: m.rename("directory", "empty"), is_redirect=True),
    "rename_of_a_merged_directory_over_an_emptied_one": Case(
        lambda m: m.rename("directory", "full"), steps(lambda m: m.create("directory/new"), emptied), is_redirect=True
    ),
    "rename_of_a_merged_directory_over_a_whiteout": Case(
        lambda m: m.rename("directory", "file"), steps(lambda m: m.create("directory/new"), lambda m: m.unlink("file")), is_redirect=True
    ),
    "exchange_of_two_lower_files": Case(lambda m: m.rename("file", "other", RENAME_EXCHANGE)),
    "exchange_of_an_upper_and_a_lower_file": Case(
        lambda m: m.rename("new", "directory/inside", RENAME_EXCHANGE), lambda m: m.create("new", b"n")
    ),
    "exchange_of_a_file_and_an_upper_directory": Case(lambda m: m.rename("file", "new", RENAME_EXCHANGE), lambda m: m.mkdir("new")),
    "exchange_of_two_lower_directories": Case(lambda m: m.rename("directory", "full", RENAME_EXCHANGE), is_redirect=True),
    "exchange_of_a_lower_file_and_a_lower_directory": Case(
        lambda m: m.rename("directory/inside", "full", RENAME_EXCHANGE), is_redirect=True
    ),
}

METACOPY = {
    "chmod_without_data": Case(lambda m: m.chmod("file", 0o640)),
    "chmod_of_two_names_without_data": Case(lambda m: m.chmod("first", 0o640), looked_up_links),
    "write_after_chmod": Case(lambda m: m.write("file", b"changed"), lambda m: m.chmod("file", 0o640)),
    "truncation_after_chmod": Case(lambda m: m.truncate("file", 4), lambda m: m.chmod("file", 0o640)),
    "growth_after_chmod": Case(lambda m: m.truncate("file", 1000), lambda m: m.chmod("file", 0o640)),
    "rename_without_data": Case(lambda m: m.rename("file", "directory/new")),
    "rename_over_a_lower_file_without_data": Case(lambda m: m.rename("file", "other")),
    "link_without_data": Case(lambda m: m.link("file", "directory/deep/new")),
    "exchange_without_data": Case(lambda m: m.rename("file", "directory/inside", RENAME_EXCHANGE)),
    "write_after_rename": Case(lambda m: m.write("directory/new", b"changed"), lambda m: m.rename("file", "directory/new")),
}
CASES |= {name: replace(case, metacopy=True) for name, case in METACOPY.items()}
INDEX = {
    "chmod_into_the_index": Case(lambda m: m.chmod("first", 0o640)),
    "chmod_of_two_names_into_the_index": Case(lambda m: m.chmod("first", 0o640), looked_up_links),
    "write_by_the_other_name": Case(lambda m: m.write("second", b"changed"), lambda m: m.chmod("first", 0o640)),
    "link_of_an_indexed_file": Case(lambda m: m.link("second", "directory/third"), lambda m: m.chmod("first", 0o640)),
    "unlink_into_the_index": Case(lambda m: m.unlink("first")),
    "unlink_of_an_indexed_name": Case(lambda m: m.unlink("first"), lambda m: m.chmod("first", 0o640)),
    "unlink_of_the_other_name": Case(lambda m: m.unlink("second"), lambda m: m.chmod("first", 0o640)),
    "unlink_of_the_last_name": Case(lambda m: m.unlink("second"), lambda m: m.unlink("first")),
    "rename_into_the_index": Case(lambda m: m.rename("first", "directory/third")),
    "rename_over_a_linked_file": Case(lambda m: m.rename("file", "first")),
    "rename_over_the_last_name": Case(lambda m: m.rename("file", "second"), lambda m: m.unlink("first")),
}
CASES |= {name: replace(case, index=True) for name, case in INDEX.items()}

DETACHED = {
    "rename_by_copying_a_lower_directory": Case(lambda m: m.rename("full", "new")),
    "rename_by_copying_a_merged_directory": Case(
        lambda m: m.rename("directory", "empty/new"), steps(lambda m: m.unlink("directory/below"), lambda m: m.create("directory/deep/new"))
    ),
    "exchange_by_copying": Case(lambda m: m.rename("directory", "full", RENAME_EXCHANGE)),
}
CASES |= {name: replace(case, userxattr=True) for name, case in DETACHED.items()}

# What ends with an fsync: after it all that the case did must survive, whatever happens.
DURABLE = {
    "create_and_fsync": Case(steps(lambda m: m.create("directory/deep/new", b"content"), lambda m: m.fsync("directory/deep/new"))),
    "write_to_a_lower_file_and_fsync": Case(steps(lambda m: m.write("file", b"changed"), lambda m: m.fsync("file"))),
    "append_deep_in_a_lower_and_fsync": Case(
        steps(lambda m: m.write("directory/deep/bottom", b"more", 6), lambda m: m.fsync("directory/deep/bottom"))
    ),
    "truncate_of_a_lower_file_and_fsync": Case(steps(lambda m: m.truncate("file", 5), lambda m: m.fsync("file"))),
    "create_over_a_whiteout_and_fsync": Case(
        steps(lambda m: m.create("file", b"content"), lambda m: m.fsync("file")), lambda m: m.unlink("file")
    ),
    "unlink_and_fsync_of_the_directory": Case(steps(lambda m: m.unlink("directory/inside"), lambda m: m.fsync("directory"))),
    "rename_and_fsync_of_the_directory": Case(steps(lambda m: m.rename("file", "other"), lambda m: m.fsync(""))),
    "mkdir_and_fsync_of_the_directory": Case(steps(lambda m: m.mkdir("directory/new"), lambda m: m.fsync("directory"))),
}

# What the extension does in one call. Those in which a small plain file is copied up.
COPIES = (
    "write_to_a_lower_file", "chmod_of_a_lower_file", "chown_of_a_lower_file", "truncate_of_a_lower_file", "emptying_of_a_lower_file",
    "growth_of_a_lower_file", "setxattr_of_a_lower_file", "removexattr_of_a_lower_file", "link_of_a_lower_file", "link_over_a_whiteout",
    "link_into_another_directory", "rename_of_a_lower_file", "rename_of_a_lower_file_over_a_lower_file",
    "rename_of_a_lower_file_over_a_whiteout", "exchange_of_two_lower_files", "exchange_of_an_upper_and_a_lower_file",
    "exchange_of_a_file_and_an_upper_directory",
)  # fmt: skip
# Those in which something is made for a caller.
MAKINGS = tuple(name for name in CASES if name.startswith(("create", "mkdir", "symlink", "mkfifo")))
AT_ONCE = (*COPIES, *MAKINGS)

RUNNABLE = {name: case for name, case in CASES.items() if IS_ROOT or not (case.is_redirect or case.metacopy or case.index)}


def without_devices(merged: Merged) -> None:
    """As where the file system refuses the device 0/0: a whiteout is then a marked file."""
    merged.view.upper.takes_devices = False


WITHOUT_DEVICES = {
    f"{name}_without_devices": replace(case, prepare=steps(without_devices, case.prepare))
    for name, case in CASES.items()
    if name.startswith(("unlink", "rmdir", "create_over", "mkdir_over", "rename")) and not (case.metacopy or case.index or case.userxattr)
}
ALL = CASES | DURABLE | WITHOUT_DEVICES
# What a write in place leaves, of which nobody said fsync, is the file system's affair: ext4 may have the new size with the old bytes.
PUBLISHED = [name for name in RUNNABLE if name not in ("write_to_an_upper_file", "write_by_the_other_name")]
# And what truncation leaves: ext4 and xfs put zeroes into the last block before the new size. That much only a disk's own log shows. Where
# a file is made and then written, or appended to, and last synced, there is a state in between.
IN_PLACE = frozenset(RUNNABLE).difference(PUBLISHED) | {
    "truncate_of_an_upper_file", "truncation_after_chmod",
    "create_and_fsync", "create_over_a_whiteout_and_fsync", "append_deep_in_a_lower_and_fsync",
}  # fmt: skip
