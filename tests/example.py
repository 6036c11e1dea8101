"""Running an example in this process, which has imported the trainer already."""

import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name, *arguments, monkeypatch, capsys):
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def percent(words, text):
    """The percentage behind some words."""
    return float(re.search(words + r" ([\d.]+)%", text)[1])
