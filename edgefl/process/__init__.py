"""Process management: file descriptors, child processes, home folders."""
