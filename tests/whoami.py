"""Who runs the tests: root of the machine, an ordinary user, or root of a user namespace, who is no more than that user."""

from __future__ import annotations

import os
from pathlib import Path

# "root", "user" or "userns"
WHO = "user" if os.geteuid() else "root" if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"] else "userns"
IS_ROOT = WHO == "root"
# What an overlay made here calls its marks.
MARKS = "trusted.overlay." if IS_ROOT else "user.overlay."
