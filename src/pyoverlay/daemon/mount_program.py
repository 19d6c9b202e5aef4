"""`mount.fuse.pyoverlay`: what mount(8), fstab and container engines call. No click: its argv and its exit codes are theirs.

    mount.fuse.pyoverlay SOURCE MERGED [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]        mount(8), options anywhere
    mount.fuse.pyoverlay -o OPTIONS MERGED                                                 podman, buildah, Docker

Engines store whiteouts as `.wh.NAME` files, and mount such a layer as an upper to see what an image changes (`podman diff IMAGE`). So where
there is no SOURCE, which mount(8) always gives, `whiteouts=aufs` is what is meant by nothing.

Here `-f` is mount(8)'s fake (do everything but mount), not the foreground. Exit codes (mount(8), "EXIT STATUS"): 0 mounted, 1 usage or
permission, 2 system error, 32 refused. Nothing is written to stderr on success, and everything inherited above it is closed: engines
wait for the end of every descriptor they gave us.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pyoverlay.core.policy import Whiteouts
from pyoverlay.daemon import launch, report
from pyoverlay.daemon.options import parse
from pyoverlay.daemon.request import Request
from pyoverlay.errors import PyoverlayError, UsageError

WAIT = 60.0
USAGE = "usage: mount.fuse.pyoverlay [SOURCE] MERGED [-sfnv] [-N NAMESPACE] [-t TYPE] -o lowerdir=A:B[,upperdir=U,workdir=W][,OPTION...]"


@dataclass(slots=True)
class _Arguments:
    """What was on the command line."""

    options: list[str] = field(default_factory=list)
    positional: list[str] = field(default_factory=list)
    is_fake: bool = False
    namespace: str | None = None
    shows: str | None = None


def main() -> None:
    """The console script."""
    report.close_all_but()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; the exit code."""
    try:
        parsed = _parsed(arguments)
        if parsed.shows is not None:
            _show(parsed.shows)
        else:
            _mount(parsed)
    except PyoverlayError as error:
        print(f"mount.fuse.pyoverlay: {error}", file=sys.stderr)
        return error.mount_status
    return 0


def _mount(arguments: _Arguments) -> None:
    *source, merged = arguments.positional
    options = parse(arguments.options)
    if not options.lowers:
        raise UsageError(f"no lowerdir= among the options; {USAGE}")
    if source and options.source is None and source[0] != "none":
        options = replace(options, source=source[0])
    if not source and not any(option.startswith("whiteouts=") for option in options.given):
        options = replace(options, whiteouts=Whiteouts.AUFS)
    request = Request(options, os.fsencode(merged))
    if arguments.namespace is not None:
        request = launch.absolute(request)
        _enter(arguments.namespace)
    if not arguments.is_fake:
        launch.mount(request, WAIT)


def _enter(namespace: str) -> None:
    """Join the mount namespace that `-N` names, by pid or by the path of its file."""
    from pyoverlay.daemon.namespaces import enter_mount_namespace

    enter_mount_namespace(f"/proc/{namespace}/ns/mnt" if namespace.isdigit() else namespace)


def _show(what: str) -> None:
    if what == "usage":
        print(USAGE)
        return
    from pyoverlay.daemon import versions

    print(*versions.lines(), sep="\n")
    versions.print_protocol()


def _parsed(arguments: Sequence[str]) -> _Arguments:
    found = _Arguments()
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            found.positional.extend(remaining)
        elif argument in ("--version", "-V"):
            found.shows = "version"
        elif argument in ("--help", "-h"):
            found.shows = "usage"
        elif argument.startswith("--"):
            raise UsageError(f"unknown option {argument}; {USAGE}")
        elif argument.startswith("-") and argument != "-":
            _read_letters(argument[1:], remaining, found)
        else:
            found.positional.append(argument)
    if found.shows is None and len(found.positional) not in (1, 2):
        raise UsageError(f"{'no mount point' if not found.positional else 'too many arguments'}; {USAGE}")
    return found


def _read_letters(letters: str, remaining: Iterator[str], found: _Arguments) -> None:
    """`-sfnv`, `-oX`, `-o X`, `-fo X`: letters together, the rest of the word or the next one as a value."""
    for position, letter in enumerate(letters):
        if letter in "oNt":
            value = letters[position + 1 :] or next(remaining, None)
            if value is None:
                raise UsageError(f"-{letter} wants a value; {USAGE}")
            _keep(letter, value, found)
            return
        if letter == "f":
            found.is_fake = True
        elif letter not in "snvrw":
            raise UsageError(f"unknown option -{letter}; {USAGE}")
        elif letter in "rw":
            found.options.append("ro" if letter == "r" else "rw")


def _keep(letter: str, value: str, found: _Arguments) -> None:
    if letter == "o":
        found.options.append(value)
    elif letter == "N":
        found.namespace = value


if __name__ == "__main__":
    main()
