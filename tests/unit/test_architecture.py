"""The walls between the rooms of the package, held by reading the sources; docs/architecture.md says why each stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PACKAGE = CHECKOUT / "src" / "pyoverlay"

# What each room may import of the package. Imports point one way: cli -> daemon, report, image -> fuse -> registry -> core. A module at
# the top of the package is a room of its own.
ROOMS = {
    "core": {"core"},
    "errors": {"errors"},
    "mountinfo": {"mountinfo"},
    "registry": {"registry", "core", "errors"},
    "fuse": {"fuse", "mountinfo", "registry", "core", "errors"},
    "daemon": {"daemon", "fuse", "mountinfo", "registry", "core", "errors", "__init__"},
    "report": {"report", "mountinfo", "registry", "core", "errors", "__init__"},
    "image": {"image", "report", "mountinfo", "registry", "core", "errors", "__init__"},
    "testing": {"testing", "core", "fuse"},
    "cli": {"cli", "daemon", "report", "image", "registry", "core", "errors", "__init__"},
    "__init__": {"daemon", "report", "image", "errors"},
    "__main__": {"cli"},
}

# Packages that are not the standard library's, and who may import them.
OUTSIDERS = {
    "pyfuse3": {"fuse/binding.py"},
    "trio": {"fuse", "daemon"},
    "outcome": {"fuse", "daemon"},
    "click": {"cli"},
}

# `print` is for what a person asked for: results of commands, and what mount(8) shows of its program.
PRINTERS = {"cli", "daemon/mount_program.py"}


@dataclass(frozen=True)
class Module:
    """A source file; `path` is relative to `top`."""

    top: Path
    path: Path

    @property
    def room(self) -> str:
        return self.path.parts[0] if len(self.path.parts) > 1 else self.path.stem

    @cached_property
    def lines(self) -> list[str]:
        return (self.top / self.path).read_text().splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse("\n".join(self.lines), str(self.path))

    def is_in(self, places: set[str]) -> bool:
        return self.room in places or str(self.path) in places

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and absolute dotted name of everything imported, also inside functions; for `from a import b` that is a.b."""
        package = ("pyoverlay", *self.path.with_suffix("").parts[:-1])
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else ()
                prefix = ".".join((*base, node.module) if node.module else base)
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)

    def at(self, line: int) -> str:
        return f"{self.path}:{line}: {self.lines[line - 1].strip()}"


def modules(top: Path) -> list[Module]:
    return [Module(top, path.relative_to(top)) for path in sorted(top.rglob("*.py"))]


SOURCES = modules(PACKAGE)
TESTS = modules(CHECKOUT / "tests")


def calls(module: Module, name: str) -> list[str]:
    """Where `name(...)` is called, dotted names as they are written."""
    return [module.at(node.lineno) for node in ast.walk(module.tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def room_imported(name: str) -> str | None:
    """The room that an import of the package leads to; None for other packages' imports."""
    parts = name.split(".")
    if parts[0] != "pyoverlay":
        return None
    is_room = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file())
    return parts[1] if is_room else "__init__"


def test_there_are_sources_to_look_at() -> None:
    assert {"core", "fuse", "daemon", "cli"} <= {module.room for module in SOURCES}


def test_every_room_is_known() -> None:
    assert {module.room for module in SOURCES} <= ROOMS.keys()


def test_imports_point_one_way() -> None:
    wrong = [
        module.at(line)
        for module in SOURCES
        for line, name in module.imports()
        if (room := room_imported(name)) is not None and room not in ROOMS[module.room]
    ]
    assert wrong == []


def test_modules_of_the_core_import_those_above_them_in_the_table_of_the_page() -> None:
    table = (CHECKOUT / "docs/architecture.md").read_text().partition("uses only those above it:")[2].partition("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    place = {name: number for number, row in enumerate(rows) for name in row}
    core = [module for module in SOURCES if module.room == "core" and module.path.stem != "__init__"]
    assert place.keys() == {module.path.stem for module in core}
    wrong = [
        module.at(line)
        for module in core
        for line, name in module.imports()
        if name.startswith("pyoverlay.core.") and place[name.split(".")[2]] >= place[module.path.stem]
    ]
    assert wrong == []


def test_outside_packages_are_imported_where_they_belong() -> None:
    wrong = [
        module.at(line)
        for module in SOURCES
        for line, name in module.imports()
        if (package := name.split(".")[0]) not in sys.stdlib_module_names | {"pyoverlay"}
        and not module.is_in(OUTSIDERS.get(package, set()))
    ]
    assert wrong == []


def test_core_is_synchronous() -> None:
    asynchronous = (ast.AsyncFunctionDef, ast.AsyncWith, ast.AsyncFor, ast.Await)
    wrong = [
        module.at(node.lineno)
        for module in SOURCES
        if module.room == "core"
        for node in ast.walk(module.tree)
        if isinstance(node, asynchronous)
    ]
    assert wrong == []


def test_no_module_shadows_a_public_function() -> None:
    """`from pyoverlay import mount` must give the function, also after somebody imported a module of that name."""
    assert not {module.room for module in SOURCES} & {"mount", "inspect", "diff", "umount", "ps"}


def test_modules_are_named_after_what_they_hold() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|managers?|handlers?|misc|common)($|_)")
    assert [str(module.path) for module in SOURCES if vague.search(module.path.stem)] == []


def test_only_commands_print() -> None:
    assert [place for module in SOURCES if not module.is_in(PRINTERS) for place in calls(module, "print")] == []


@pytest.mark.parametrize("sleep", ["time.sleep", "trio.sleep", "sleep"])
def test_nothing_sleeps_where_an_event_belongs(sleep: str) -> None:
    """What has no event, such as the idle of an idle mount, says so on the line."""
    reason = re.compile(r"\)\s+# \w+\W+\w+\W+\w+")
    assert [place for module in [*TESTS, *SOURCES] for place in calls(module, sleep) if not reason.search(place)] == []


CHANGING = {
    "os.link", "os.symlink", "os.mkdir", "os.mkfifo", "os.mknod", "os.unlink", "os.remove", "os.rmdir", "os.rename", "os.replace",
    "os.chmod", "os.fchmod", "os.chown", "os.lchown", "os.fchown", "os.utime", "os.truncate", "os.ftruncate", "os.setxattr",
    "os.removexattr", "os.write", "os.pwrite", "os.writev", "os.pwritev", "os.copy_file_range", "os.sendfile", "os.splice",
    "os.posix_fallocate", "os.fsync", "os.fdatasync", "os.sync", "fcntl.ioctl",
    "syscalls.linkat", "syscalls.renameat2", "syscalls.fchmodat", "syscalls.utimensat", "syscalls.fallocate", "syscalls.syncfs",
    "syscalls.sync_file_range", "syscalls.start_writeback",
}  # fmt: skip
# Not the upper: its own session's files and sockets, and reading with an ioctl.
ELSEWHERE = {"core/calls.py", "core/syscalls.py", "fuse/mountpoint.py", "fuse/session.py"}


def changes(module: Module) -> Iterator[str]:
    """Where a file system is changed, or a function that does so is named: passed on, it would be called by somebody else."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in CHANGING:
            yield module.at(node.lineno)
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("os.open", "open", "syscalls.openat2"):
            continue
        if re.search("O_CREAT|O_TMPFILE|O_TRUNC|'[wax]b?[+]?'", ast.unparse(node)):
            yield module.at(node.lineno)


def test_whatever_changes_an_upper_is_called_in_one_place() -> None:
    """So that the tests which count, fail and kill at each such call leave none out."""
    assert [*changes(Module(PACKAGE, Path("core/calls.py")))] != []
    reading = re.compile(r"fcntl\.ioctl\(fd, (cmd, bytes\(_READING|syscalls\.FS_IOC_GETFSUUID)")
    found = [place for module in SOURCES if module.is_in({"core", "fuse"}) and not module.is_in(ELSEWHERE) for place in changes(module)]
    assert [place for place in found if not reading.search(place)] == []


def handlers(module: Module) -> Iterator[ast.ExceptHandler]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.ExceptHandler))


def exceptions(handler: ast.ExceptHandler) -> set[str]:
    """What it catches, by name; empty for a bare except."""
    match handler.type:
        case None:
            return set()
        case ast.Tuple(elts=elements):
            return {ast.unparse(element) for element in elements}
        case expression:
            return {ast.unparse(expression)}


def test_no_error_of_the_system_is_dropped_unseen() -> None:
    """Which errno may be passed over is said by its class (FileNotFoundError) or by a condition, never by dropping all of them."""
    everything = {"OSError", "EnvironmentError", "IOError"}
    dropped = [
        module.at(handler.lineno)
        for module in [*SOURCES, *TESTS]
        for handler in handlers(module)
        if all(isinstance(statement, ast.Pass) for statement in handler.body) and exceptions(handler) & everything
    ]
    suppressed = [
        place
        for module in [*SOURCES, *TESTS]
        for spelling in ("suppress", "contextlib.suppress")
        for place in calls(module, spelling)
        if re.search(r"suppress\([^)]*\b(OSError|Exception|BaseException)\b", place)
    ]
    assert dropped + suppressed == []


def test_broad_excepts_give_their_reason() -> None:
    """To catch everything is right where a bug must cost one request and not the mount, and where it is raised again. The rest say why."""
    reason = re.compile(r"except\b.*:\s+# (noqa: [A-Z]+\d+\W+)?\w+\W+\w+")
    wrong = [
        module.at(handler.lineno)
        for module in [*SOURCES, *TESTS]
        for handler in handlers(module)
        if (exceptions(handler) or {"BaseException"}) & {"Exception", "BaseException"}
        and not reason.search(module.lines[handler.lineno - 1])
        and not raises_again(handler)
    ]
    assert wrong == []


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pyoverlay", {"trio", "pyfuse3", "click", "subprocess"}),
        ("pyoverlay.core", {"trio", "pyfuse3", "click"}),
        ("pyoverlay.cli", {"trio", "pyfuse3"}),
        ("pyoverlay.cli.commit", {"trio", "pyfuse3"}),
        ("pyoverlay.cli.export", {"trio", "pyfuse3"}),
        ("pyoverlay.cli.import_", {"trio", "pyfuse3"}),
        ("pyoverlay.daemon.mount_program", {"trio", "pyfuse3", "click"}),
        ("pyoverlay.report", {"trio", "pyfuse3", "click"}),
        ("pyoverlay.registry", {"trio", "pyfuse3", "click"}),
        ("pyoverlay.fuse.session", {"click"}),
    ],
)
def test_importing_loads_no_more_than_is_needed(module: str, absent: set[str]) -> None:
    """Each costs start-up time of a command or memory of an idle mount."""
    program = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    assert absent & set(result.stdout.split()) == set()
