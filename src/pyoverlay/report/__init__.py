"""What people ask of a mount, or of the layers of one: inspect, ps, diff, which. All of it works without the daemon, and none changes
anything.
"""
