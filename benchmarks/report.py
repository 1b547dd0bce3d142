"""Put the newest results into README.md: `python benchmarks/report.py`. Every benchmark does so at its end.

A block between `<!-- results: NAME -->` and `<!-- end -->` is replaced by results/NAME.md.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, results: Path) -> str:
    """`page` with every block replaced; a block without results says so."""

    def block(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.md"
        body = path.read_text(encoding="utf-8") if path.exists() else "Not measured yet.\n"
        return f"{match[1]}\n{body}\n{match[3]}"

    return _BLOCK.sub(block, page)


def update_readme(folder: Path = HERE) -> None:
    """Rewrite `folder/README.md` in place."""
    readme = folder / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8"), folder / "results"), encoding="utf-8")


if __name__ == "__main__":
    update_readme()
