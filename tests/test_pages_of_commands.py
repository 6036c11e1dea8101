"""The pages on `torchreg path` and `torchreg report`: code runs, commands exist, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from torchreg.cli import _parser

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("l1-or-l2.md", "report.md")}
every_page = pytest.mark.parametrize("page", PAGES)


@every_page
def test_the_links_and_pictures_are_there_and_small(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    assert links
    for link in links:
        assert (DOCS / link).exists(), link
        assert not link.endswith(".png") or (DOCS / link).stat().st_size < 150_000, link


@every_page
def test_the_commands_are_understood(page):
    commands = re.findall(r"^torchreg .*$", PAGES[page], flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert _parser().parse_args(shlex.split(command, comments=True)[1:]).run


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", PAGES["l1-or-l2.md"], flags=re.DOTALL):
        exec(block, {})
    assert (tmp_path / "four.png").stat().st_size > 20_000
