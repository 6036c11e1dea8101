"""The style sheet of a report: legible in light and dark, on paper, and without a network."""

COLORS = 6
DASHES = 3

_LIGHT = ("#0072b2", "#d55e00", "#00805d", "#b0578d", "#a87400", "#1c1c1c")
_DARK = ("#57a9ea", "#ff8f4a", "#2fcf9f", "#eaa3cc", "#f2bb45", "#f0f0f0")

BASE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1c1c; --quiet: #5c5c5c; --rule: #e3e3e3; --card: #fafafa;
  @LIGHT@ }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #ececec; --quiet: #a5a9b0; --rule: #31353c;
  --card: #1d2026; @DARK@ } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 3rem) 4rem; max-width: 1500px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--rule); }
p { margin: .3rem 0; max-width: 75ch; }
.quiet, figcaption small, th small { color: var(--quiet); font-weight: normal; }
code { font-size: .92em; overflow-wrap: anywhere; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .6rem 0; display: flex;
  flex-wrap: wrap; gap: .3rem 1.1rem; border-bottom: 1px solid var(--rule); margin-top: 1rem; }
.legend label { display: inline-flex; align-items: center; gap: .4rem; cursor: pointer; overflow-wrap: anywhere; }
.legend svg { width: 30px; height: 10px; flex: none; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr)); gap: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(218px, 1fr)); gap: 1rem; }
.rows { display: grid; gap: 1rem; }
figure { margin: 0; padding: .6rem .7rem .4rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .2rem; overflow-wrap: anywhere; }
figure svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--quiet); font-size: 11px; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.dot, rect { fill: currentColor; }
.dash1 .line { stroke-dasharray: 6 3; } .dash2 .line { stroke-dasharray: 2 2.5; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--quiet); font-weight: 600; }
td.word { text-align: left; white-space: normal; overflow-wrap: anywhere; max-width: 40ch; }
.pictures { display: flex; gap: .8rem; overflow-x: auto; padding-bottom: .3rem; }
.pictures div { flex: none; width: 190px; }
.pictures img { max-width: 190px; max-height: 190px; min-height: 12px; image-rendering: pixelated; display: block;
  outline: 1px solid var(--rule); margin: 1px; }
.pictures span { display: block; font-size: .8rem; color: var(--quiet); overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .6rem 0; font-weight: 600; }
.problems { border-left: 4px solid var(--c1); padding-left: .8rem; }
@media print { .legend { position: static; } figure { break-inside: avoid; } }
"""


def style_sheet(groups: int) -> str:
    """The style sheet, with a rule for each group of runs that hides it when its box is not ticked."""
    light, dark = (" ".join(f"--c{i}: {color};" for i, color in enumerate(colors)) for colors in (_LIGHT, _DARK))
    colors = "".join(f".c{i} {{ color: var(--c{i}); }}\n" for i in range(COLORS))
    boxes = "".join(f"body:has(#g{i}:not(:checked)) .g{i} {{ display: none; }}\n" for i in range(groups))
    return BASE.replace("@LIGHT@", light).replace("@DARK@", dark) + colors + boxes


def style_of(group: int) -> str:
    """The classes of a group of runs: its own, a colour, and dashes from the seventh on.

    >>> style_of(7)
    'g7 c1 dash1'
    """
    dashes = group // COLORS % DASHES
    return f"g{group} c{group % COLORS}" + (f" dash{dashes}" if dashes else "")
