"""One exponent for parameters and data: L = E + A/N^alpha + B/D^alpha."""

from typing import ClassVar

from cluster.laws.forms.base import LogSum


class Tied(LogSum):
    """Fewer parameters, hence narrower intervals, where both exponents are alike (Gadre et al., arXiv:2403.08540)."""

    title: ClassVar[str] = "E + A/N^alpha + B/D^alpha"
    axes_needed: ClassVar = ("n", "d")
    names: ClassVar = ("log_A", "log_B", "log_E", "alpha")
    terms: ClassVar = (
        ("log_A", (("alpha", "n", -1.0),)),
        ("log_B", (("alpha", "d", -1.0),)),
        ("log_E", ()),
    )
    source: ClassVar[str] = "Gadre et al., arXiv:2403.08540"
