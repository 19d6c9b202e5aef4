"""readdir, with entries that come and go while somebody reads."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from tests.posix.check import Step, check, fifo, file, folder, names_in, opened, symlink
from tests.posix.system_calls import DirectoryStream

MANY = 5000


def _files(count: int) -> Step:
    def make(d: Path) -> None:
        for number in range(count):
            os.close(os.open(d / f"entry{number:05}", os.O_WRONLY | os.O_CREAT, 0o644))

    return make


@check(file("f"), folder("sub"), symlink("s"), fifo("p"))
def entries_tell_their_kind_and_number(d: Path) -> None:
    with DirectoryStream(d) as stream:
        entries = {name: (number, kind) for name, number, kind in stream}
    assert sorted(entries) == ["f", "p", "s", "sub"]
    for name, (number, kind) in entries.items():
        status = os.lstat(d / name)
        assert number == status.st_ino, name
        assert kind == stat.S_IFMT(status.st_mode) >> 12, name


@check(folder("sub", file("f")))
def dot_and_dotdot_are_the_directory_and_its_parent(d: Path) -> None:
    assert os.stat(d / "sub" / ".").st_ino == os.stat(d / "sub").st_ino
    assert os.stat(d / "sub" / "..").st_ino == os.stat(d).st_ino
    shown = subprocess.run(["ls", "-fa", d / "sub"], capture_output=True, check=True, text=True).stdout.split()
    assert sorted(shown) == [".", "..", "f"]


@check(file("f"))
def a_listing_follows_what_is_made_and_removed(d: Path) -> None:
    assert names_in(d) == ["f"]
    (d / "new").touch()
    assert names_in(d) == ["f", "new"]
    os.mkdir(d / "new2")
    assert names_in(d) == ["f", "new", "new2"]
    os.rename(d / "f", d / "g")
    assert names_in(d) == ["g", "new", "new2"]
    os.unlink(d / "g")
    os.unlink(d / "new")
    os.rmdir(d / "new2")
    assert names_in(d) == []


@check(file("a"), file("b"))
def rewinddir_shows_what_came_since(d: Path) -> None:
    with DirectoryStream(d) as stream:
        assert sorted(stream.names()) == ["a", "b"]
        (d / "new").touch()
        os.unlink(d / "a")
        stream.rewind()
        assert sorted(stream.names()) == ["b", "new"]


@check(_files(MANY))
def a_large_directory_is_listed_without_loss_or_repetition(d: Path) -> None:
    with DirectoryStream(d) as stream:
        names = stream.names()
    assert len(names) == MANY
    assert sorted(names) == [f"entry{number:05}" for number in range(MANY)]


@check(_files(MANY))
def a_large_directory_can_be_emptied_while_it_is_read(d: Path) -> None:
    seen = 0
    with DirectoryStream(d) as stream:
        for name in stream:
            os.unlink(d / name[0])
            seen += 1
    assert seen == MANY
    assert names_in(d) == []
    os.rmdir(d)
    os.mkdir(d)


@check(_files(400))
def what_stays_is_listed_exactly_once_while_others_go_and_come(d: Path) -> None:
    """Every third entry is removed, and as many others made, while the listing is under way."""
    stays = {f"entry{number:05}" for number in range(400) if number % 3}
    seen: list[str] = []
    with DirectoryStream(d) as stream:
        for position, (name, _, _) in enumerate(stream):
            seen.append(name)
            if position < 133:
                os.unlink(d / f"entry{position * 3:05}")
                (d / f"made{position}").touch()
    assert len(seen) == len(set(seen))
    assert stays <= set(seen)
    assert len(names_in(d)) == 400


@check(_files(300))
def seekdir_returns_to_the_place_telldir_told(d: Path) -> None:
    with DirectoryStream(d) as stream:
        places, order = [], []
        while True:
            place = stream.tell()
            entry = stream.read()
            if entry is None:
                break
            places.append(place)
            order.append(entry[0])
        for index in (299, 0, 150, 7, 298):
            stream.seek(places[index])
            assert stream.read() is not None
            stream.seek(places[index])
            assert stream.names() == order[index:]


@check(_files(300))
def seekdir_holds_its_place_while_entries_go(d: Path) -> None:
    """After a seek to the middle, everything that comes after it and still exists is listed once, in its order, and nothing before it.

    Whether an entry removed meanwhile is listed, POSIX leaves open (readdir): ext4 does not, the kernel's cache of a FUSE listing may.
    """
    with DirectoryStream(d) as stream:
        order = [stream.read() for _ in range(150)]
        place = stream.tell()
        rest = stream.names()
    before = [entry[0] for entry in order if entry is not None]
    with DirectoryStream(d) as stream:
        for _ in range(150):
            stream.read()
        for name in before:
            os.unlink(d / name)
        for name in rest[::2]:
            os.unlink(d / name)
        stream.seek(place)
        listed = stream.names()
    removed = set(rest[::2])
    assert [name for name in listed if name not in removed] == rest[1::2]
    assert not set(listed) & set(before)


@check(_files(300))
def two_readers_of_one_directory_do_not_disturb_each_other(d: Path) -> None:
    with DirectoryStream(d) as one, DirectoryStream(d) as two:
        first, second = [], []
        for _ in range(100):
            first.append(one.read())
        second.extend(two.names())
        first.extend(one)
    assert sorted(entry[0] for entry in first if entry is not None) == sorted(second)
    assert len(set(second)) == 300


@check(_files(50), folder("sub"))
def entries_made_while_reading_do_not_hide_others(d: Path) -> None:
    with DirectoryStream(d) as stream:
        first = [stream.read() for _ in range(10)]
        for number in range(200):
            (d / f"made{number}").touch()
        names = [entry[0] for entry in first if entry is not None] + stream.names()
    assert len(names) == len(set(names))
    assert {f"entry{number:05}" for number in range(50)} | {"sub"} <= set(names)


@check(folder("sub", file("f")))
def a_directory_is_read_by_a_descriptor_after_a_rename(d: Path) -> None:
    with opened(d / "sub", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.rename(d / "sub", d / "new")
        (d / "new" / "g").touch()
        assert sorted(os.listdir(fd)) == ["f", "g"]
