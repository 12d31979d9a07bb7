"""How many files and connections this process may have open: as many as the system lets it.

The usual soft limit of 1,024 is a habit of programs that call select(); none of ours does.
"""

from __future__ import annotations

MOST = 1 << 20  # some programs that inherit the limit go through all numbers below it


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one; return what it is now."""
    import resource  # not on Windows, where there is no such limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST if soft == resource.RLIM_INFINITY else soft
