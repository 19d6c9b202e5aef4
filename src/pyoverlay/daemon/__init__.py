"""The life of a mount's process: options, refusals, locks, the way to the background, readiness, signals, logs."""
