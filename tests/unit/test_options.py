"""The option language, by its words: what each spelling means, what is passed over, what is refused and how it is said."""

from __future__ import annotations

import os

import pytest

from pyoverlay.core.policy import Fsync, IdRange, Override, RedirectDir, Whiteouts
from pyoverlay.daemon.options import Options, escape, lowerdirs, parse, policy, split, with_directories
from pyoverlay.errors import OptionRefused

LAYERS = "lowerdir=/a,upperdir=/u,workdir=/w"


def refusal(*strings: str) -> str:
    with pytest.raises(OptionRefused) as caught:
        parse(strings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ── spelling ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("string", "options"),
    [
        ("", []),
        (",,,", []),
        ("ro", ["ro"]),
        ("ro,,nodev,", ["ro", "nodev"]),
        (r"upperdir=/a\,b,ro", [r"upperdir=/a\,b", "ro"]),
        (r"upperdir=/a\\,ro", [r"upperdir=/a\\", "ro"]),
        ("upperdir=/a\\", ["upperdir=/a\\"]),
        ('context="system_u:object_r:t:s0:c1,c2",ro', ['context="system_u:object_r:t:s0:c1,c2"', "ro"]),
        ('fscontext="a,b",rootcontext="c,d"', ['fscontext="a,b"', 'rootcontext="c,d"']),
        ('upperdir=/a"b,workdir=/c"d', ['upperdir=/a"b', 'workdir=/c"d']),
        ("upperdir=/new\nline,ro", ["upperdir=/new\nline", "ro"]),
    ],
)
def test_options_end_at_a_comma_that_nothing_protects(string: str, options: list[str]) -> None:
    assert split(string) == options


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("/a", (b"/a",)),
        ("/a:/b:c", (b"/a", b"/b", b"c")),
        (r"/a\:b:/c", (b"/a:b", b"/c")),
        (r"/a\,b", (b"/a,b",)),
        (r"/a\\:/b", (b"/a\\", b"/b")),
        (r"/a\:", (b"/a:",)),
        ("/\udcff", (b"/\xff",)),
    ],
)
def test_layers_end_at_a_colon_that_nothing_protects(value: str, layers: tuple[bytes, ...]) -> None:
    assert lowerdirs(value) == (layers, ())


@pytest.mark.parametrize("path", [b"/plain", b"/a:b", b"/a,b", b"/a\\", b"\\:,\\", b"/\xff\n ", b'/"q"'])
def test_an_escaped_path_is_read_back_as_it_was(path: bytes) -> None:
    options = parse([f"lowerdir={escape(path)}:{escape(path)},upperdir={escape(path)},ro"])
    assert (options.lowers, options.upper, options.read_only) == ((path, path), path, True)


@pytest.mark.parametrize("value", ["", ":", "/a:", ":/a"])
def test_an_empty_layer_is_refused(value: str) -> None:
    assert refusal(f"lowerdir={value}").startswith("-o lowerdir: an empty path")


@pytest.mark.parametrize(
    ("options", "data_lowers"),
    [
        ("lowerdir=/a:/b::/c::/d", (b"/c", b"/d")), ("lowerdir=/a:/b,datadir+=/c:x,datadir+=/d", (b"/c:x", b"/d")),
        (r"lowerdir=/a\:/b::/c\:", (b"/c:",)),
    ],
)  # fmt: skip
def test_data_only_layers_come_after_those_that_show(options: str, data_lowers: tuple[bytes, ...]) -> None:
    parsed = parse([options])
    assert (parsed.lowers, parsed.data_lowers) in (((b"/a", b"/b"), data_lowers), ((b"/a:/b",), data_lowers))
    given = with_directories(parse([]), lowers="/a::/c", upper="/u", work="/w")
    assert (given.lowers, given.data_lowers) == ((b"/a",), (b"/c",))


@pytest.mark.parametrize("value", ["/a::/d:/b", "/a::/d:", "::/d", "/a:::/d", "/a::"])
def test_data_only_layers_that_a_showing_one_follows_are_refused(value: str) -> None:
    assert refusal(f"lowerdir={value}").startswith("-o lowerdir: an empty path")
    assert "after data-only layers" in refusal("lowerdir=/a,datadir+=/d,lowerdir+=/b")


@pytest.mark.parametrize("option", ["metacopy=on", "verity=on", "verity=require", "datadir+=/d"])
def test_metacopy_files_and_user_marks_contradict_each_other(option: str) -> None:
    assert "contradicts userxattr" in refusal(f"lowerdir=/a,userxattr,{option}")


@pytest.mark.parametrize(("value", "size"), [("0", 0), ("4096", 4096), ("3K", 3 << 10), ("5m", 5 << 20), ("2G", 2 << 30)])
def test_a_limit_is_a_number_of_bytes(value: str, size: int) -> None:
    assert policy(parse([f"lowerdir=/a,rename_copy_limit={value}"]), privileged=False).rename_copy_limit == size


@pytest.mark.parametrize("value", ["", "1T", "-1", "1.5G", "G"])
def test_any_other_limit_is_refused(value: str) -> None:
    assert "wants a number of bytes" in refusal(f"lowerdir=/a,rename_copy_limit={value}")


def test_an_index_is_roots() -> None:
    options = parse(["lowerdir=/a,index=on,uuid=auto"])
    assert policy(options, privileged=True).index
    assert policy(options, privileged=True).uuid.value == "auto"
    with pytest.raises(OptionRefused, match="index=on: finds lower files by their handles"):
        policy(options, privileged=False)


def test_metacopy_wants_redirects() -> None:
    assert "contradicts metacopy=on" in refusal("lowerdir=/a,metacopy=on,redirect_dir=follow")
    told = policy(parse(["lowerdir=/a,metacopy=on,verity=require"]), privileged=True)
    assert (told.metacopy, told.verity.value, told.redirect_dir.value) == (True, "require", "on")


def test_lowerdir_plus_appends_a_layer_whose_colons_are_its_own() -> None:
    assert parse(["lowerdir+=/a:b,lowerdir+=/c"]).lowers == (b"/a:b", b"/c")
    assert parse(["lowerdir=/a:/b,lowerdir+=/c"]).lowers == (b"/a", b"/b", b"/c")
    assert parse(["lowerdir+=/x,lowerdir=/a"]).lowers == (b"/a",)


def test_a_later_option_wins_also_in_another_string() -> None:
    assert parse(["ro,lowerdir=/a", "rw,lowerdir=/b"]) == Options(lowers=(b"/b",), given=("ro", "lowerdir=/a", "rw", "lowerdir=/b"))


def test_500_layers_in_megabytes_of_options_are_read() -> None:
    """Reading whose steps grew with the square of that would not end before the test's time limit: here, and below."""
    layers = [f"/{number}{'x' * 4000}" for number in range(500)]
    string = "lowerdir=" + ":".join(layers) + ",x-comment=" + "y" * 2_000_000 + r",upperdir=/a\,b"
    options = parse([string])
    assert options.lowers == tuple(map(os.fsencode, layers))
    assert options.upper == b"/a,b"


def test_a_backslash_in_front_of_everything_is_read_too() -> None:
    assert parse(["lowerdir=" + r"\a" * 500_000]).lowers == (b"a" * 500_000,)


# ── what they mean ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def meaning(string: str) -> dict[str, object]:
    """The fields in which these options differ from none."""
    plain, options = parse([LAYERS]), parse([f"{LAYERS},{string}"])
    fields = (name for name in Options.__slots__ if name != "given")
    return {name: getattr(options, name) for name in fields if getattr(options, name) != getattr(plain, name)}


@pytest.mark.parametrize(
    ("string", "fields"),
    [
        ("ro", {"read_only": True}),
        ("ro,rw", {}),
        ("nosuid,nodev,noexec", {"suid": False, "dev": False, "exec": False}),
        ("suid,dev,exec", {"suid": True, "dev": True}),
        ("noatime", {"noatime": True}),
        ("noatime,relatime", {}),
        ("nodiratime", {"nodiratime": True}),
        ("sync", {"sync": True}),
        ("dirsync", {"dirsync": True}),
        ("fsname=my data", {"source": "my data"}),
        (r"fsname=a\,b", {"source": "a,b"}),
        ("subtype=overlay", {"subtype": "overlay"}),
        ("allow_other", {"allow_other": True}),
        ("redirect_dir=off", {"redirect_dir": RedirectDir.OFF}),
        ("redirect_dir=nofollow,userxattr", {"redirect_dir": RedirectDir.NOFOLLOW, "userxattr": True}),
        ("whiteouts=kernel", {"whiteouts": Whiteouts.KERNEL}),
        ("volatile", {"fsync": Fsync.VOLATILE}),
        ("fsync=strict", {"fsync": Fsync.STRICT}),
        ("fsync=0", {"fsync": Fsync.VOLATILE}),
        ("fsync=0,fsync=1", {}),
        ("writeback", {"writeback": True}),
        ("writeback=on,writeback=0", {}),
        ("squash_to_root", {"squash_uid": 0, "squash_gid": 0}),
        ("squash_to_uid=1000,squash_to_gid=100", {"squash_uid": 1000, "squash_gid": 100}),
        ("uidmapping=:0:1:1000", {"uid_map": (IdRange(0, 1, 1000),)}),
        ("gidmapping=0:1:1001:1001:0:1", {"gid_map": (IdRange(0, 1, 1001), IdRange(1001, 0, 1))}),
        ("uidmapping=0:4294967294:1", {"uid_map": (IdRange(0, 4294967294, 1),)}),
        ("xattr_permissions=1", {"override": Override.PRIVILEGED}),
        ("xattr_permissions=2", {"override": Override.CONTAINERS}),
        ("stop_timeout=2.5", {"stop_timeout": 2.5}),
        ("inodes=5000", {"inodes": 5000}),
        ("cpu_latency=on", {"cpu_latency": True}),
        ("cpu_latency=off", {"cpu_latency": False}),
        ("cpu_latency=on,cpu_latency=auto", {}),
    ],
)
def test_an_option_does_what_it_says(string: str, fields: dict[str, object]) -> None:
    assert meaning(string) == fields


@pytest.mark.parametrize(
    "string",
    [
        'context="system_u:object_r:container_file_t:s0:c1,c2"',
        "fscontext=a,defcontext=b,rootcontext=c",
        "private",
        "_netdev,nofail,noauto,auto,user,users,owner,user=me,defaults,async",
        "x-systemd.automount,x-gvfs-show,X-mount.mkdir=0700",
        "default_permissions",
        "override_creds",
        "xino=on,xino=off,xino=auto",
        "index=off,metacopy=off,nfs_export=off,verity=off,uuid=null,xattr_permissions=0,writeback=0",
        "timeout=1000000000",
    ],
)
def test_an_option_that_changes_nothing_is_passed_over(string: str) -> None:
    assert meaning(string) == {}


def test_what_was_given_is_kept_for_people() -> None:
    assert parse(["ro,,nodev", "private"]).given == ("ro", "nodev", "private")


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "option",
    ["noacl", "noxattrs", "timeout=5", "nfs_export=on", "remount"],
)  # fmt: skip
def test_what_is_not_there_yet_is_refused_and_not_swallowed(option: str) -> None:
    message = refusal(LAYERS, option)
    assert message.startswith(f"-o {option.partition('=')[0]}")
    assert "not implemented" in message


@pytest.mark.parametrize("option", ["nonsense", "nonsense=1", "lowerdirs=/a", "RO", "upper=/a", "ro=1", "=", "bind"])
def test_an_unknown_option_is_refused_by_name(option: str) -> None:
    message = refusal(LAYERS, option)
    assert message.startswith(f"-o {option}: ")
    assert "unknown option" in message or "takes no value" in message


@pytest.mark.parametrize(
    "option",
    ["redirect_dir=maybe", "fsync=2", "whiteouts=", "squash_to_uid=-1", "squash_to_uid=4294967295", "squash_to_gid=0x1",
     "inodes=10", "inodes=many",
     "stop_timeout=soon", "stop_timeout=-1", "xattr_permissions=3", "xino=perhaps", "uidmapping=0:1", "gidmapping=a:b:c", "gidmapping=",
     "gidmapping=:", "subtype=a b"],
)  # fmt: skip
def test_an_unknown_value_is_refused_with_what_there_is(option: str) -> None:
    message = refusal(LAYERS, option)
    assert message.startswith(f"-o {option}: ")
    assert "one of" in message or "wants" in message


@pytest.mark.parametrize(
    ("option", "reason"),
    [("uidmapping=0:0:0", "empty"), ("uidmapping=0:1:4294967295", "past the last id"), ("gidmapping=4294967295:0:1", "past the last id"),
     ("uidmapping=0:5:2:1:9:1", "overlap"), ("gidmapping=0:5:2:9:6:1", "overlap")],
)  # fmt: skip
def test_a_map_that_no_id_could_be_read_from_is_refused(option: str, reason: str) -> None:
    message = refusal(LAYERS, option)
    assert message.startswith(f"-o {option}: ")
    assert reason in message


@pytest.mark.parametrize("option", ["upperdir", "workdir", "fsname", "redirect_dir", "lowerdir", "lowerdir+"])
def test_an_option_without_its_value_is_refused(option: str) -> None:
    assert refusal(LAYERS, option).startswith(f"-o {option}: ")


def test_a_refusal_stays_on_one_line() -> None:
    assert refusal("non\nsense\x1b") == r"-o non\x0asense\x1b: unknown option"


def test_a_work_directory_needs_an_upper() -> None:
    assert "no upperdir" in refusal("lowerdir=/a,workdir=/w")


def test_user_marks_and_redirects_contradict_each_other() -> None:
    assert "contradicts userxattr" in refusal("lowerdir=/a,userxattr,redirect_dir=on")


# ── what the core is told ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_marks_follow_the_privileges_unless_asked_otherwise() -> None:
    options = parse([LAYERS])
    assert policy(options, privileged=True).userxattr is False
    assert policy(options, privileged=False).userxattr is True
    assert policy(parse([f"{LAYERS},userxattr"]), privileged=True).userxattr is True


def test_directories_given_as_arguments_are_not_unescaped_but_for_the_lowers() -> None:
    options = with_directories(parse([]), lowers=r"/a\:b:/c", upper=r"/u\:x", work="/w,y")
    assert (options.lowers, options.upper, options.work) == ((b"/a:b", b"/c"), rb"/u\:x", b"/w,y")
