"""Extended attributes and access control lists."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tests.posix.check import (
    NOBODY,
    SOMEBODY,
    Step,
    add,
    as_user,
    check,
    device,
    fails,
    fifo,
    file,
    folder,
    mode_of,
    names_in,
    opened,
    socket,
    symlink,
    umask,
    xattr,
)
from tests.posix.system_calls import (
    ACL_ACCESS,
    ACL_DEFAULT,
    ACL_GROUP_OBJ,
    ACL_MASK,
    ACL_OTHER,
    ACL_USER,
    ACL_USER_OBJ,
    acl,
    getxattr_into,
    listxattr_into,
)

# Which spaces of names each kind of object may carry. `user.` is for files and directories alone (xattr(7)).
SPACES = {
    "file": ("user.", "trusted.", "security."),
    "folder": ("user.", "trusted.", "security."),
    "symlink": ("trusted.", "security."),
    "fifo": ("trusted.", "security."),
    "socket": ("trusted.", "security."),
    "device": ("trusted.", "security."),
}


def _object(kind: str) -> Step:
    match kind:
        case "file":
            return file("x")
        case "folder":
            return folder("x", file("inside"))
        case "symlink":
            return symlink("x", "nowhere")
        case "socket":
            return socket("x")
        case "device":
            return device("x")
        case _:
            return fifo("x")


def _get(path: Path, name: str) -> bytes:
    return os.getxattr(path, name, follow_symlinks=False)


def _life_of_an_attribute(name: str) -> Step:
    def claim(d: Path) -> None:
        x = d / "x"
        with fails(errno.ENODATA):
            _get(x, name)
        with fails(errno.ENODATA):
            os.removexattr(x, name, follow_symlinks=False)
        with fails(errno.ENODATA):
            os.setxattr(x, name, b"value", os.XATTR_REPLACE, follow_symlinks=False)
        os.setxattr(x, name, b"first\0value", os.XATTR_CREATE, follow_symlinks=False)
        assert _get(x, name) == b"first\0value"
        with fails(errno.EEXIST):
            os.setxattr(x, name, b"second", os.XATTR_CREATE, follow_symlinks=False)
        os.setxattr(x, name, b"second", os.XATTR_REPLACE, follow_symlinks=False)
        os.setxattr(x, name + "2", b"", follow_symlinks=False)
        assert (_get(x, name), _get(x, name + "2")) == (b"second", b"")
        listed = [each for each in os.listxattr(x, follow_symlinks=False) if each.startswith(name)]
        assert sorted(listed) == [name, name + "2"]
        os.removexattr(x, name, follow_symlinks=False)
        with fails(errno.ENODATA):
            _get(x, name)
        assert name not in os.listxattr(x, follow_symlinks=False)

    return claim


def _kept(name: str) -> Step:
    def claim(d: Path) -> None:
        x = d / "x"
        assert _get(x, name) == b"was there"
        assert name in os.listxattr(x, follow_symlinks=False)
        with fails(errno.EEXIST):
            os.setxattr(x, name, b"second", os.XATTR_CREATE, follow_symlinks=False)
        os.lchown(x, SOMEBODY, SOMEBODY)
        assert _get(x, name) == b"was there"
        os.removexattr(x, name, follow_symlinks=False)
        assert name not in os.listxattr(x, follow_symlinks=False)

    return claim


for _kind, _spaces in SPACES.items():
    for _space in _spaces:
        _called = f"{_space[:-1]}_attribute_of_a_{_kind}"
        _attribute = f"{_space}pyoverlay_check"
        add(f"a_{_called}_is_set_replaced_and_removed", (_object(_kind),), _life_of_an_attribute(_attribute))
        add(f"a_{_called}_that_was_there_is_kept", (_object(_kind), xattr("x", _attribute, b"was there")), _kept(_attribute))


@check(symlink("s", "nowhere"), fifo("p"), socket("q"), device("c"))
def user_attributes_are_for_files_and_directories_alone(d: Path) -> None:
    for name in ("s", "p", "q", "c"):
        with fails(errno.EPERM):
            os.setxattr(d / name, "user.x", b"value", follow_symlinks=False)


@check(file("f"))
def attribute_names_and_values_have_limits(d: Path) -> None:
    f = d / "f"
    with fails(errno.E2BIG):
        os.setxattr(f, "user.big", b"x" * 65537)
    with fails(errno.ERANGE):
        os.setxattr(f, "user." + "n" * 251, b"x")
    with fails(errno.EOPNOTSUPP):
        os.setxattr(f, "nosuchspace.x", b"x")
    with fails(errno.EOPNOTSUPP):
        os.getxattr(f, "nospace")
    os.setxattr(f, "user." + "n" * 250, b"x")
    os.setxattr(f, "user.large", b"y" * 2000)
    assert os.getxattr(f, "user.large") == b"y" * 2000
    assert sorted(os.listxattr(f)) == sorted(["user.large", "user." + "n" * 250])


@check(file("f"), xattr("f", "user.x", b"0123456789"))
def a_buffer_too_small_for_an_attribute_is_erange(d: Path) -> None:
    f = d / "f"
    assert getxattr_into(f, "user.x", 0) == 10
    assert getxattr_into(f, "user.x", 10) == 10
    with fails(errno.ERANGE):
        getxattr_into(f, "user.x", 9)
    assert listxattr_into(f, 0) == len("user.x") + 1
    with fails(errno.ERANGE):
        listxattr_into(f, 3)


@check(file("f"))
def many_attributes_are_listed(d: Path) -> None:
    names = [f"user.attribute{number:03}" for number in range(60)]
    for name in names:
        os.setxattr(d / "f", name, name.encode())
    assert sorted(os.listxattr(d / "f")) == names
    assert all(os.getxattr(d / "f", name) == name.encode() for name in names)


@check(file("f"))
def a_change_of_an_attribute_moves_the_ctime_alone(d: Path) -> None:
    os.utime(d / "f", ns=(10**18, 10**18))
    before = os.stat(d / "f")
    os.setxattr(d / "f", "user.x", b"value")
    after = os.stat(d / "f")
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_ctime_ns >= before.st_ctime_ns
    assert (d / "f").read_bytes() == b"old content"


@check(file("f"))
def attributes_can_be_used_by_descriptor(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        os.setxattr(fd, "user.x", b"value")
        assert os.getxattr(fd, "user.x") == b"value"
    assert os.getxattr(d / "f", "user.x") == b"value"


@check(
    file("mine", uid=NOBODY),
    file("other", mode=0o644),
    file("secret", mode=0o600),
    xattr("other", "user.x", b"public"),
    xattr("other", "trusted.x", b"hidden"),
    xattr("secret", "user.x", b"secret"),
)
def an_ordinary_user_sees_and_changes_attributes_as_the_mode_allows(d: Path) -> None:
    def use() -> None:
        os.setxattr("mine", "user.x", b"value")
        assert os.getxattr("mine", "user.x") == b"value"
        with fails(errno.EACCES):
            os.setxattr("other", "user.x", b"value")
        with fails(errno.EPERM):
            os.setxattr("mine", "trusted.x", b"value")
        with fails(errno.ENODATA):
            os.getxattr("other", "trusted.x")
        assert os.getxattr("other", "user.x") == b"public"
        assert os.listxattr("other") == ["user.x"]
        with fails(errno.EACCES):
            os.getxattr("secret", "user.x")

    as_user(d, use)
    assert os.getxattr(d / "other", "user.x") == b"public"


@check(folder("sticky", mode=0o1777))
def user_attributes_of_a_sticky_directory_are_for_its_owner(d: Path) -> None:
    def try_to_set() -> None:
        with fails(errno.EPERM):
            os.setxattr("sticky", "user.x", b"value")

    as_user(d, try_to_set)


# Access control lists.

_NAMED = acl((ACL_USER_OBJ, 6), (ACL_USER, 4, NOBODY), (ACL_GROUP_OBJ, 0), (ACL_MASK, 4), (ACL_OTHER, 0))
_DEFAULT = acl((ACL_USER_OBJ, 7), (ACL_USER, 7, NOBODY), (ACL_GROUP_OBJ, 5), (ACL_MASK, 7), (ACL_OTHER, 0))


@check(file("f", b"secret", mode=0o600))
def an_access_acl_lets_a_named_user_in(d: Path) -> None:
    def try_to_read() -> None:
        with fails(errno.EACCES):
            os.open("f", os.O_RDONLY)

    as_user(d, try_to_read)
    os.setxattr(d / "f", ACL_ACCESS, _NAMED)
    assert mode_of(d / "f") == 0o640
    assert os.getxattr(d / "f", ACL_ACCESS) == _NAMED
    as_user(d, lambda: Path("f").read_bytes())

    def try_to_write() -> None:
        with fails(errno.EACCES):
            os.open("f", os.O_WRONLY)

    as_user(d, try_to_write)
    as_user(d, try_to_read, uid=SOMEBODY)
    os.removexattr(d / "f", ACL_ACCESS)
    as_user(d, try_to_read)
    assert mode_of(d / "f") == 0o640 or mode_of(d / "f") == 0o600


@check(file("f", b"secret", mode=0o600), xattr("f", ACL_ACCESS, _NAMED))
def an_access_acl_that_was_there_counts(d: Path) -> None:
    as_user(d, lambda: Path("f").read_bytes())

    def try_to_read() -> None:
        with fails(errno.EACCES):
            os.open("f", os.O_RDONLY)

    as_user(d, try_to_read, uid=SOMEBODY)
    with opened(d / "f", os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b" more")
    assert os.getxattr(d / "f", ACL_ACCESS) == _NAMED
    as_user(d, lambda: Path("f").read_bytes())
    as_user(d, try_to_read, uid=SOMEBODY)


@check(file("f", mode=0o600), xattr("f", ACL_ACCESS, _NAMED))
def chmod_changes_the_mask_of_an_acl(d: Path) -> None:
    os.chmod(d / "f", 0o600)
    expected = acl((ACL_USER_OBJ, 6), (ACL_USER, 4, NOBODY), (ACL_GROUP_OBJ, 0), (ACL_MASK, 0), (ACL_OTHER, 0))
    assert os.getxattr(d / "f", ACL_ACCESS) == expected

    def try_to_read() -> None:
        with fails(errno.EACCES):
            os.open("f", os.O_RDONLY)

    as_user(d, try_to_read)


@check(file("f", mode=0o600))
def an_acl_that_says_no_more_than_a_mode_becomes_the_mode(d: Path) -> None:
    os.setxattr(d / "f", ACL_ACCESS, acl((ACL_USER_OBJ, 6), (ACL_GROUP_OBJ, 4), (ACL_OTHER, 4)))
    assert mode_of(d / "f") == 0o644
    with fails(errno.ENODATA):
        os.getxattr(d / "f", ACL_ACCESS)


@check(file("f"), symlink("s", "f"))
def acls_that_make_no_sense_are_refused(d: Path) -> None:
    with fails(errno.EINVAL):
        os.setxattr(d / "f", ACL_ACCESS, acl((ACL_USER_OBJ, 6)))
    with fails(errno.EINVAL):
        os.setxattr(d / "f", ACL_ACCESS, acl((ACL_USER_OBJ, 6)) + b"half")
    with fails(errno.EACCES):
        os.setxattr(d / "f", ACL_DEFAULT, _DEFAULT)
    with fails(errno.EOPNOTSUPP):
        os.setxattr(d / "s", ACL_ACCESS, _NAMED, follow_symlinks=False)
    assert mode_of(d / "f") == 0o644


@check(file("f"), folder("d"))
def an_acl_that_is_not_there_can_be_removed(d: Path) -> None:
    for name, attribute in (("f", ACL_ACCESS), ("d", ACL_ACCESS), ("d", ACL_DEFAULT)):
        os.removexattr(d / name, attribute)
        os.setxattr(d / name, attribute, acl())
        os.setxattr(d / name, attribute, _NAMED)
        for _ in range(2):
            os.removexattr(d / name, attribute)
        with fails(errno.ENODATA):
            os.getxattr(d / name, attribute)


@check(file("f", uid=SOMEBODY))
def only_the_owner_sets_an_acl(d: Path) -> None:
    def try_to_set() -> None:
        with fails(errno.EPERM):
            os.setxattr("f", ACL_ACCESS, _NAMED)

    as_user(d, try_to_set)
    as_user(d, lambda: os.setxattr("f", ACL_ACCESS, _NAMED), uid=SOMEBODY)
    assert os.getxattr(d / "f", ACL_ACCESS) == _NAMED


def _inherits(d: Path) -> None:
    """A default ACL replaces the umask, and its permissions are cut by the mode that was asked for."""
    with umask(0o077):
        os.close(os.open(d / "team" / "file", os.O_WRONLY | os.O_CREAT, 0o666))
        os.mkdir(d / "team" / "folder", 0o777)
        os.mkfifo(d / "team" / "fifo", 0o640)
        os.symlink("x", d / "team" / "symlink")
    assert mode_of(d / "team" / "file") == 0o660
    assert mode_of(d / "team" / "folder") == 0o770
    assert mode_of(d / "team" / "fifo") == 0o640
    file_acl = acl((ACL_USER_OBJ, 6), (ACL_USER, 7, NOBODY), (ACL_GROUP_OBJ, 5), (ACL_MASK, 6), (ACL_OTHER, 0))
    assert os.getxattr(d / "team" / "file", ACL_ACCESS) == file_acl
    assert os.getxattr(d / "team" / "folder", ACL_ACCESS) == _DEFAULT
    assert os.getxattr(d / "team" / "folder", ACL_DEFAULT) == _DEFAULT
    fifo_acl = acl((ACL_USER_OBJ, 6), (ACL_USER, 7, NOBODY), (ACL_GROUP_OBJ, 5), (ACL_MASK, 4), (ACL_OTHER, 0))
    assert os.getxattr(d / "team" / "fifo", ACL_ACCESS) == fifo_acl
    with fails(errno.ENODATA):
        os.getxattr(d / "team" / "file", ACL_DEFAULT)
    as_user(d, lambda: Path("team/file").write_bytes(b"by the named user"))


def _sets_and_inherits(d: Path) -> None:
    os.setxattr(d / "team", ACL_DEFAULT, _DEFAULT)
    _inherits(d)


# Without DONT_MASK the kernel applies the umask before it asks, whatever ACL there is; pyfuse3 cannot set that flag.
_TEAM = (folder("team"), xattr("team", ACL_DEFAULT, _DEFAULT))
add("what_is_made_inherits_a_default_acl_that_was_there", _TEAM, _inherits, needs_wire=True)
add("what_is_made_inherits_a_default_acl_just_set", (folder("team"),), _sets_and_inherits, needs_wire=True)


@check(folder("team"))
def without_a_default_acl_the_umask_counts_again(d: Path) -> None:
    os.setxattr(d / "team", ACL_DEFAULT, _DEFAULT)
    os.removexattr(d / "team", ACL_DEFAULT)
    with umask(0o027):
        os.close(os.open(d / "team" / "file", os.O_WRONLY | os.O_CREAT, 0o666))
    assert mode_of(d / "team" / "file") == 0o640
    with fails(errno.ENODATA):
        os.getxattr(d / "team" / "file", ACL_ACCESS)
    assert names_in(d / "team") == ["file"]
