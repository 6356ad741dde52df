"""What a run prints: Keel's own lines, and nothing of libraries about features that Keel does not use."""

import logging
import warnings

_NOISY = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def quiet() -> None:
    """Call it after `lightning` was imported, which sets its loggers up anew."""
    logging.basicConfig(format="keel: %(levelname)s: %(message)s", level=logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    # No caller changes what a network returns in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
