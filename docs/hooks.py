"""What MkDocs calls while it builds: adds the generated pages, which are not files of this folder."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.generate import api, commands, configuration

PAGES = {
    "reference/configuration.md": configuration.page,
    "reference/commands.md": commands.page,
    "reference/api.md": api.page,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files
