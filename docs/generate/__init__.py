"""The pages of the documentation that come from the code: configuration, commands, Python API.

Each module has `page()`, which returns Markdown. They are made while MkDocs builds (`docs/hooks.py`), so that they
cannot differ from the code. Nothing here needs more than edgefl's own requirements.
"""
