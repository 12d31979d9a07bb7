"""Raise the limit of open files and connections of this process to the system's maximum.

The usual soft limit of 1,024 protects programs that call select(); edgefl does not call it.
"""

from __future__ import annotations

MOST = 1 << 20  # some programs that inherit the limit loop over all numbers below it


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard limit; return the new limit."""
    import resource  # not on Windows, where there is no such limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST if soft == resource.RLIM_INFINITY else soft
