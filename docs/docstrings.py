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


_DATA: dict[str, list[str]] = {}


def _process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = escaped(lines)
    if what in ("data", "attribute", "property"):
        _DATA[name] = list(lines)


def _restore(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Data as they are described: napoleon takes what stands before a colon for their type."""
    lines[:] = _DATA.pop(name, lines)


def _skip(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the methods that scikit-learn makes for metadata routing: its own documentation has them."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def _public(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A link for `ProxSGD` in the docstring of another module, where it is not a name of that module."""
    target = node["reftarget"].removeprefix("torchreg.")
    short = re.search(r"[A-Z]\w*(\.\w+)?$", target)
    if node.get("refdomain") != "py" or short is None:
        return None
    domain = env.domains["py"]
    names = [name for name, there in domain.objects.items() if name.endswith(f".{short[0]}") and not there.aliased]
    names = [name for name in names if name == f"torchreg.{short[0]}"] or names
    if len(names) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", names[0], node, content)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _restore, priority=600)  # after napoleon's
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon's, which adds markup
    app.connect("missing-reference", _public)
