"""Neural operators: unique trajectories and samples seen are separate axes, and the grid leaves a floor of its own."""

from typing import ClassVar

from cluster.laws.forms.base import LogSum


class Operator(LogSum):
    """n: parameters; u: unique trajectories; d: samples seen (frames times epochs); h: grid spacing.

    `order` is the order in h of the error that the resolution leaves, such as that of the scheme which made the data.
    """

    title: ClassVar[str] = "E + A/N^alpha + B/U^beta + G/D^gamma + K h^order"
    axes_needed: ClassVar = ("n", "u", "d", "h")
    names: ClassVar = ("log_A", "log_B", "log_G", "log_K", "log_E", "alpha", "beta", "gamma", "order")
    terms: ClassVar = (
        ("log_A", (("alpha", "n", -1.0),)),
        ("log_B", (("beta", "u", -1.0),)),
        ("log_G", (("gamma", "d", -1.0),)),
        ("log_K", (("order", "h", 1.0),)),
        ("log_E", ()),
    )
    source: ClassVar[str] = "the form of arXiv:2203.15556 with the discretisation error of a scheme of that order"


class OperatorFixedGrid(LogSum):
    """One resolution: what the grid leaves is part of E."""

    title: ClassVar[str] = "E + A/N^alpha + B/U^beta + G/D^gamma"
    axes_needed: ClassVar = ("n", "u", "d")
    names: ClassVar = ("log_A", "log_B", "log_G", "log_E", "alpha", "beta", "gamma")
    terms: ClassVar = (
        ("log_A", (("alpha", "n", -1.0),)),
        ("log_B", (("beta", "u", -1.0),)),
        ("log_G", (("gamma", "d", -1.0),)),
        ("log_E", ()),
    )
    source: ClassVar[str] = "as `operator`, without the axis h"
