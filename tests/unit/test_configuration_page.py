"""docs/configuration.md shows the defaults in force, and its examples are accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from supervisord_ctr import config

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_lists_every_setting_as_it_is() -> None:
    # After a change of the settings: python tools/configuration.py
    assert BLOCKS[-1].strip() == config.render(config.load(Path("/dev/null"))).strip()


@pytest.mark.parametrize("block", BLOCKS)
def test_the_examples_are_accepted(block: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(block, encoding="utf-8")
    config.load(path)
