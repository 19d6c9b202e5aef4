"""Times as Docker prints them."""

from __future__ import annotations

from datetime import UTC, datetime


def stamp(moment: datetime) -> str:
    """RFC 3339 with microseconds, in UTC, as `docker inspect` has it: 2026-11-27T22:41:32.434964Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


_HOUR, _DAY = 3600, 24 * 3600
# From how many seconds on it is told in which unit.
_UNITS = (
    (2 * 365 * _DAY, 365 * _DAY, "years"),
    (2 * 30 * _DAY, 30 * _DAY, "months"),
    (14 * _DAY, 7 * _DAY, "weeks"),
    (48 * _HOUR, _DAY, "days"),
)


def duration(seconds: float) -> str:
    """About how long, as `docker ps` says it (go-units, HumanDuration): 5 seconds, About a minute, 3 weeks."""
    for least, unit, name in _UNITS:
        if seconds >= least:
            return f"{int(seconds // unit)} {name}"
    minutes = int(seconds // 60)
    if minutes >= 60:
        hours = int(seconds / _HOUR + 0.5)
        return "About an hour" if hours == 1 else f"{hours} hours"
    if minutes:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    whole = int(seconds)
    if whole:
        return "1 second" if whole == 1 else f"{whole} seconds"
    return "Less than a second"
