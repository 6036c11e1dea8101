"""docs/trainers.md shows code that the examples run, and names tests that are there."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/trainers.md").read_text(encoding="utf-8")
EXAMPLES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_code_is_an_examples(block):
    indented = (textwrap.indent(block, " " * width) for width in (0, 4, 8))
    assert any(some in text for some in indented for text in EXAMPLES.values())


def test_the_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


def test_every_cell_of_the_table_names_a_test_that_is_there():
    rows = [line.split("|")[2:-1] for line in PAGE.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 8
    for cell in (cell.strip() for row in rows for cell in row):
        if cell in ("–", "not skorch's", "by Accelerate"):
            continue
        name, test = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", cell).groups()
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(encoding="utf-8"), cell
