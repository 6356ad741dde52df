"""Width and depth as axes of their own: L = E + A/width^alpha + B/D^beta + G/depth^gamma."""

from typing import ClassVar

from cluster.laws.forms.base import LogSum


class Shape(LogSum):
    """For ladders in which width and depth are varied apart (after McLeish et al., arXiv:2502.06857)."""

    title: ClassVar[str] = "E + A/width^alpha + B/D^beta + G/depth^gamma"
    axes_needed: ClassVar = ("width", "d", "depth")
    names: ClassVar = ("log_A", "log_B", "log_G", "log_E", "alpha", "beta", "gamma")
    terms: ClassVar = (
        ("log_A", (("alpha", "width", -1.0),)),
        ("log_B", (("beta", "d", -1.0),)),
        ("log_G", (("gamma", "depth", -1.0),)),
        ("log_E", ()),
    )
    source: ClassVar[str] = "McLeish et al., arXiv:2502.06857"
