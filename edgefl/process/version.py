"""The version of this installation, as used in homes, HTTP headers and `edgefl --version`."""

__version__ = "0.1.0"
