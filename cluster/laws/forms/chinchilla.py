"""Loss against parameters and data, one power each: L = E + A/N^alpha + B/D^beta."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from cluster.laws.forms.base import LogSum
from cluster.laws.optimise import Array


class Chinchilla(LogSum):
    """Approach 3 of Hoffmann et al., arXiv:2203.15556; estimator as corrected by Besiroglu et al., arXiv:2404.10102."""

    title: ClassVar[str] = "E + A/N^alpha + B/D^beta"
    axes_needed: ClassVar = ("n", "d")
    names: ClassVar = ("log_A", "log_B", "log_E", "alpha", "beta")
    terms: ClassVar = (
        ("log_A", (("alpha", "n", -1.0),)),
        ("log_B", (("beta", "d", -1.0),)),
        ("log_E", ()),
    )
    source: ClassVar[str] = "Hoffmann et al., arXiv:2203.15556; Besiroglu et al., arXiv:2404.10102"

    def grid(self) -> Array:
        """The 4,500 starts of the original protocol, for N and D in parameters and tokens."""
        a = b = np.arange(0.0, 26.0, 5.0)
        e = np.arange(-1.0, 1.01, 0.5)
        exponents = np.arange(0.0, 2.01, 0.5)
        mesh = np.meshgrid(a, b, e, exponents, exponents, indexing="ij")
        theta = np.stack([axis.ravel() for axis in mesh], axis=1)
        theta[:, 0] -= theta[:, 3] * self.centres["n"]
        theta[:, 1] -= theta[:, 4] * self.centres["d"]
        return theta
