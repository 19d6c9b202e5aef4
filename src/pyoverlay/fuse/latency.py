"""Processors that stay awake while clients are at work: a request to the kernel's power management, pm_qos_interface.rst.

A client sleeps while its request is served. Where nothing else wants its processor that one goes to sleep as well, and to wake it for
the reply takes longer than the request: on a virtual machine of two processors a stat(2) took 17 µs, and 9 while they stayed awake
(2026-11). It costs what polling processors use, for as long as requests come in a row and 2 ms more; so by default it is asked for where
there are few.
"""

from __future__ import annotations

import os

from pyoverlay.errors import Refusal

DEVICE = "/dev/cpu_dma_latency"
FEW = 4
"""Processors: at most so many are kept awake unasked. On larger machines that would be watts, and their processors sleep less deeply."""


def is_wanted_unasked() -> bool:
    """Are there more processors than one, and few? A single one has no other to wake."""
    return 1 < (os.cpu_count() or 1) <= FEW


def open_device(wanted: bool | None) -> int:
    """A descriptor of the device, for as long as a mount may ask for anything; -1: none is wanted, or to be had.

    wanted: None where it is for us to decide. Refusal: it is wanted, and cannot be had.
    """
    if wanted is False or (wanted is None and not is_wanted_unasked()):
        return -1
    try:
        return os.open(DEVICE, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        if wanted is None:
            return -1
        raise Refusal(DEVICE, "cannot be asked", error.errno, "leave out cpu_latency=on") from error
