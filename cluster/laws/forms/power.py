"""Loss against one axis, compute by default: a power law with and without a floor."""

from typing import ClassVar

from cluster.laws.forms.base import LogSum


class Power(LogSum):
    """A straight line in logarithms."""

    title: ClassVar[str] = "A/C^alpha"
    axes_needed: ClassVar = ("c",)
    names: ClassVar = ("log_A", "alpha")
    terms: ClassVar = (("log_A", (("alpha", "c", -1.0),)),)
    source: ClassVar[str] = "Kaplan et al., arXiv:2001.08361"


class Saturating(LogSum):
    """A power law that levels off. Two decades of compute are the least that can tell E from zero."""

    title: ClassVar[str] = "E + A/C^alpha"
    axes_needed: ClassVar = ("c",)
    names: ClassVar = ("log_A", "log_E", "alpha")
    terms: ClassVar = (("log_A", (("alpha", "c", -1.0),)), ("log_E", ()))
    source: ClassVar[str] = "Henighan et al., arXiv:2010.14701"
