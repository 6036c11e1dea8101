"""How weights are cut into groups: rows, columns, channels, kernels, heads, blocks, any labelling, or several tensors.

A `Groups` value says it without knowing the weight; `Groups.of` cuts a weight of some shape, which it fits or is an
error. Names (`NAMES`) stand for the common ones wherever groups are asked for: ``GroupLasso(1e-3, "out_channels")``.
`Shared` groups reach over several parameters.
"""

from torchreg.cuts import Cut
from torchreg.groups.base import Groups, from_dict
from torchreg.groups.shared import Member, Shared
from torchreg.groups.single import NAMES, Blocks, Heads, Labels, Slices, as_groups

__all__ = [
    "NAMES",
    "Blocks",
    "Cut",
    "Groups",
    "Heads",
    "Labels",
    "Member",
    "Shared",
    "Slices",
    "as_groups",
    "from_dict",
]
