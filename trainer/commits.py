"""Which steps of a run are committed: the names, for those who read no checkpoint (light to import)."""

import re

from datamodules.store import Store

MARKER = "COMMITTED"
_STEP = re.compile(r"^step-(\d{8,})$")


def step_name(step: int) -> str:
    """Folder of a step, such as `step-00000100`; sorts by step."""
    return f"step-{step:08d}"


def committed_steps(store: Store) -> list[int]:
    """Steps with a marker, ascending, under the `checkpoints/` store of a run. Existence only; see `trainer.checkpoint`."""
    steps = set()
    for path in store.list(""):
        folder, _, file = path.partition("/")
        match = _STEP.match(folder)
        if match and file == MARKER:
            steps.add(int(match.group(1)))
    return sorted(steps)
