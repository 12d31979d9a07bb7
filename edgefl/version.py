"""The version of this installation, for whatever names it: homes, headers, `edgefl --version`."""

__version__ = "0.1.0"
