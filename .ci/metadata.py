"""Metadata that need the repository's public address: links of the package index, and its page.

README.md has relative links and pictures, which a package index cannot resolve. With an address in
pyproject.toml they become absolute, at the version's tag, and badges and project links are added;
without one, the pictures and the targets of the relative links are left out.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def urls(repository: str) -> dict[str, str]:
    """The project links of the package index."""
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }


def page(readme: str, repository: str, version: str) -> str:
    """README.md as the page of the package index, with absolute links or none."""

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if not repository:
            return "" if picture else text
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository}/{kind}/v{version}/{target})"

    # Code blocks are left as they are.
    parts = re.split(r"(```.*?```)", readme, flags=re.DOTALL)
    relative = re.compile(r"(!?)\[([^][]*(?:\[[^][]*\][^][]*)*)\]\((?!https?://|#)([^)\s]+)\)")
    parts[::2] = [re.sub(r"\n{3,}", "\n\n", relative.sub(link, part)) for part in parts[::2]]
    workflow = f"{repository}/actions/workflows/ci.yml"
    badges = f"[![Tests]({workflow}/badge.svg)]({workflow})\n\n" if repository else ""
    return badges + "".join(parts)


class Metadata(MetadataHookInterface):
    """Fills in `urls` and `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling for every build and editable installation."""
        repository = self.config.get("repository", "").rstrip("/")
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = page(readme, repository, metadata["version"])
        metadata["urls"] = urls(repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
