"""Maximal update parametrisation (arXiv:2203.03466): the best rate of a narrow model is that of a wide one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.parametrization.parts import BasedConfig, Kind, Part, positive
from trainer.parametrization.rule import Case, Growth, Rule, Setting

FORMS = ("multiplier", "table")


@dataclass
class MuPConfig(BasedConfig):
    """`form`: the readout's 1/width is a multiplier of its output (as PyPI's mup has it), or lies in its initial values
    and its rate (`table`); both train the same function. `output_multiplier`, `embedding_multiplier`,
    `attention_multiplier`: constants on the readout, on what embeddings give and on attention scores, to be tuned on the
    base model. `zero_readout`: the readout starts at zero.
    """

    form: str = "multiplier"
    output_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    zero_readout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"form={self.form}: choose one of {', '.join(FORMS)}")
        for name in ("output_multiplier", "embedding_multiplier", "attention_multiplier"):
            positive(name, getattr(self, name))


class MuP(Part):
    """With m the ratio of a tensor's fan-in (f: fan-out) to that of the base model:

    | | initial std | rate, Adam | rate, SGD | multiplier |
    |---|---|---|---|---|
    | embedding, vector | 1 | 1 | f | 1 |
    | hidden, spectral | m^-1/2 | 1/m | f/m | 1 |
    | readout, as a multiplier | 1 | 1 | m | 1/m |
    | readout, as a table | 1/m | 1/m | 1/m | 1 |

    Attention scores are q.k over the number of features instead of its root. A spectral weight's fans are channels.
    Gradients shrink as 1/m behind a readout, and Adam's epsilon with them, so that it stays the same part of them.
    """

    config_class: ClassVar[type] = MuPConfig
    kind: ClassVar[Kind] = "width"
    config: MuPConfig

    def rule(self, tensor: Growth, case: Case) -> Rule:
        config, start, role = self.config, 1.0 / tensor.std, tensor.role
        adam, m, f = case.family == "adam", tensor.fan_in, tensor.fan_out
        if role in ("hidden", "spectral"):
            return Rule(role, 1 / m if adam else f / m, 1.0, self._eps(m), start * m**-0.5)
        if role == "readout":
            start = 0.0 if config.zero_readout else start
            if config.form == "table":
                return Rule(role, 1 / m, 1.0, 1.0, start / m, config.output_multiplier)
            return Rule(role, 1.0 if adam else m, 1.0, self._eps(m), start, config.output_multiplier / m)
        weight = config.embedding_multiplier if role == "embedding" else 1.0
        return Rule(role, 1.0 if adam else f, 1.0, self._eps(f), start, weight)

    def factor(self, setting: Setting, case: Case) -> float | None:
        config = self.config
        if setting.kind == "attention":  # own is E^-1/2, base E0^-1/2: together E0^1/2 / E
            return config.attention_multiplier * setting.own**2 / setting.base
        if setting.kind == "score" and setting.weight is not None:
            if config.form == "table":
                raise ValueError("form=table: a token table that is the readout, too, needs form=multiplier")
            if config.zero_readout:
                raise ValueError("zero_readout=true: the readout is the token table; use tie_embeddings=false")
            return config.output_multiplier * setting.own / setting.weight.fan_out
        return None

    def _eps(self, growth: float) -> float:
        return 1 / growth if self.config.scale_epsilon else 1.0
