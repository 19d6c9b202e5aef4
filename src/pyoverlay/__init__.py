"""pyoverlay: an overlay file system in userspace.

    from pyoverlay import diff, inspect, mount

    with mount(lowers=["/srv/app", "/srv/base"], upper="/srv/up", merged="/mnt") as m:
        (m.merged / "etc/motd").write_text("hello")
        print(diff(m.merged), inspect(m.merged).requests)

Public names are loaded on first use, so that `import pyoverlay` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyoverlay.daemon.mounted import Mounted, mount
    from pyoverlay.errors import DaemonFailed, OptionRefused, PyoverlayError, Refusal
    from pyoverlay.report.changes import Kind
    from pyoverlay.report.diff import Difference, diff
    from pyoverlay.report.inspect import Inspection, inspect
    from pyoverlay.report.mounts import State

__version__ = "0.1.0"

_HOMES = {
    "DaemonFailed": "pyoverlay.errors",
    "Difference": "pyoverlay.report.diff",
    "Inspection": "pyoverlay.report.inspect",
    "Kind": "pyoverlay.report.changes",
    "Mounted": "pyoverlay.daemon.mounted",
    "OptionRefused": "pyoverlay.errors",
    "PyoverlayError": "pyoverlay.errors",
    "Refusal": "pyoverlay.errors",
    "State": "pyoverlay.report.mounts",
    "diff": "pyoverlay.report.diff",
    "inspect": "pyoverlay.report.inspect",
    "mount": "pyoverlay.daemon.mounted",
}

__all__ = [
    "DaemonFailed",
    "Difference",
    "Inspection",
    "Kind",
    "Mounted",
    "OptionRefused",
    "PyoverlayError",
    "Refusal",
    "State",
    "__version__",
    "diff",
    "inspect",
    "mount",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
