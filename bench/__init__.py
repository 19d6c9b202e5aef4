"""How fast an overlay is: every workload on the kernel's overlayfs, on fuse-overlayfs and on pyoverlay, over the same layers.

`python -m bench` runs it; scripts/benchmark installs what it needs first; docs/performance.md says how to read the result.
"""
