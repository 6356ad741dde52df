"""The laws by name. A new one is a file here and a line below."""

from cluster.laws.forms.base import Law, LogSum
from cluster.laws.forms.broken import Broken, BrokenOnce, BrokenTwice
from cluster.laws.forms.chinchilla import Chinchilla
from cluster.laws.forms.data_constrained import DataConstrained
from cluster.laws.forms.joint import Joint
from cluster.laws.forms.kaplan import Kaplan
from cluster.laws.forms.operator import Operator, OperatorFixedGrid
from cluster.laws.forms.power import Power, Saturating
from cluster.laws.forms.shape import Shape
from cluster.laws.forms.tied import Tied

__all__ = ["FORMS", "Broken", "Law", "LogSum", "lookup"]

FORMS: dict[str, type[Law]] = {
    "chinchilla": Chinchilla,
    "tied": Tied,
    "kaplan": Kaplan,
    "joint": Joint,
    "data_constrained": DataConstrained,
    "shape": Shape,
    "power": Power,
    "saturating": Saturating,
    "broken1": BrokenOnce,
    "broken2": BrokenTwice,
    "operator": Operator,
    "operator_fixed_grid": OperatorFixedGrid,
}


def lookup(name: str) -> type[Law]:
    """The class of a law.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FORMS:
        raise ValueError(f"no law '{name}': choose one of {', '.join(FORMS)}")
    return FORMS[name]
