#!/usr/bin/env python3
"""Write the list of every setting in docs/configuration.md anew, from the settings themselves."""

from __future__ import annotations

from pathlib import Path

from supervisord_ctr import config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    kept = text[:text.rindex("```toml\n")]
    rendered = config.render(config.load(Path("/dev/null"))).strip()
    PAGE.write_text(f"{kept}```toml\n{rendered}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
