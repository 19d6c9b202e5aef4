"""What tests of overlays are made of: trees as literals, comparable snapshots of trees, and mounts that clean up after themselves.

Needs the standard library alone: it drives pyoverlay through its command line, as people do.
"""

from pyoverlay.testing.mounts import (
    Connection,
    Mount,
    MountRefusedError,
    Overlay,
    OverlayFactory,
    OverlayHungError,
    mounts_below,
    processes_marked,
    rests,
)
from pyoverlay.testing.trees import (
    Device,
    Directory,
    Entry,
    Fifo,
    File,
    HardLink,
    Node,
    Socket,
    Symlink,
    Tree,
    Whiteout,
    is_whiteout,
    make_tree,
    snapshot,
    witness,
)

__all__ = [
    "Connection",
    "Device",
    "Directory",
    "Entry",
    "Fifo",
    "File",
    "HardLink",
    "Mount",
    "MountRefusedError",
    "Node",
    "Overlay",
    "OverlayFactory",
    "OverlayHungError",
    "Socket",
    "Symlink",
    "Tree",
    "Whiteout",
    "is_whiteout",
    "make_tree",
    "mounts_below",
    "processes_marked",
    "rests",
    "snapshot",
    "witness",
]
