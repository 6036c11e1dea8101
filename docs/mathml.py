"""Formulas as MathML, which browsers draw by themselves: the site needs no network and no script for them."""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    formula = rf"\begin{{aligned}}{node.astext().strip()}\end{{aligned}}"
    translator.body.append(f'<div class="math">{tex2mathml(formula, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
