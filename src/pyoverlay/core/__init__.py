"""The overlay itself: plain directories in, plain directories out.

No FUSE, no trio, no click, nothing asynchronous: every function here runs to its end and raises OSError with the errno that the caller
of the system call shall see. Read in this order: policy, marks, syscalls, calls, layer, inode, view, copyup, change, rename, attributes.
"""
