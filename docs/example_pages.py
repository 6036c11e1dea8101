"""Gives the scripts of examples/ the titles that sphinx-gallery asks for."""

import ast
import re
import shutil
from pathlib import Path


def write_examples(source: Path, target: Path) -> None:
    """Copy the examples to ``target``, each with a title and its commands as code, and a header for the gallery."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    header = "Examples\n========\n\nScripts, which the tests run, and what they share: ``python examples/NAME.py``."
    (target / "README.rst").write_text(header + "\n", encoding="utf-8")
    for path in sorted(source.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        opening = ast.parse(text).body[0]
        code = "\n".join(text.splitlines()[opening.end_lineno :])
        (target / path.name).write_text(f'r"""{page(path.name, opening.value.value)}"""\n{code}\n', encoding="utf-8")


def page(name: str, docstring: str) -> str:
    """The docstring as reStructuredText, under the name of the file."""
    paragraphs = [_paragraph(paragraph) for paragraph in docstring.strip().split("\n\n")]
    return "\n\n".join([name, "=" * len(name), *paragraphs]).replace(f"{name}\n\n=", f"{name}\n=", 1) + "\n"


def _paragraph(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    if all(re.match(r"(python|tensorboard|torchrun|accelerate) ", line) for line in lines):
        return "\n".join([".. code-block:: sh", "", *(f"    {line}" for line in lines)])
    return re.sub(r"([|*])", r"\\\1", "\n".join(lines))
