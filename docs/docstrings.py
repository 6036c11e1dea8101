"""Makes reStructuredText of the docstrings' prose, in which |w| is a modulus and no substitution."""

import re
from typing import Any

_LITERAL = re.compile(r"(``.+?``|`[^`]+`|(?<![\w*])\*\w[^*]*\w\*(?![\w*]))")  # code and emphasis


def escaped(lines: list[str]) -> list[str]:
    """The lines with bars, asterisks and trailing underscores outside code as they are meant: as themselves.

    >>> escaped(["λ Σ|w| for `L1`, w* and ``a|b``", "", ">>> a * b", "c * d", "", "coef_ is"])
    ['λ Σ\\\\|w\\\\| for `L1`, w\\\\* and ``a|b``', '', '>>> a * b', 'c * d', '', 'coef\\\\_ is']
    """
    done, example, directive = [], False, None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if directive is not None and line.strip() and indent <= directive:
            directive = None
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        as_is = example or directive is not None
        if re.match(r"\s*\.\. [\w:-]+::", line):
            as_is, directive = True, indent
        done.append(line if as_is else "".join(_prose(part) for part in _LITERAL.split(line)))
    return done


def _prose(part: str) -> str:
    if part and part[0] in "`*" and part[-1] == part[0] and len(part) > 1:
        return part
    part = re.sub(r"^(\s*\w+: \w)\.", r"\1\\.", part)  # "dampening: d." is no list
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", re.sub(r"([|*])", r"\\\1", part))


def _process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = escaped(lines)


def _skip(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the methods that scikit-learn makes for metadata routing: its own documentation has them."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def _public(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A link for `ProxSGD` in the docstring of another module, where it is not a name of that module."""
    if node.get("refdomain") != "py" or node["reftarget"].startswith("torchreg."):
        return None
    target = f"torchreg.{node['reftarget']}"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon's, which adds markup
    app.connect("missing-reference", _public)
