"""Lets a worker of a run that has this folder in its PYTHONPATH sleep before each step for KEEL_TEST_STEP_S seconds: a run
that is there only while something happens to it leaves the processors to others. Python imports it as it starts."""

import os
import sys

if "trainer" in sys.orig_argv and "fit" in sys.orig_argv and os.environ.get("RANK"):
    import time

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seconds = float(os.environ["KEEL_TEST_STEP_S"])
    register_optimizer_step_pre_hook(lambda *_: time.sleep(seconds))
