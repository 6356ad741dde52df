"""Units of the loss of a language model."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def bits_per_byte(nats_per_token: Number, bytes_per_token: float = 1.0) -> Number:
    """Cross entropy in nats per token to bits per byte of text: `nats / ln 2 / bytes_per_token`."""
    return nats_per_token / (math.log(2.0) * bytes_per_token)
