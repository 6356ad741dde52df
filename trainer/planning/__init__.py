"""Planning ahead: what a run would need on a machine that is not at hand.

`simulate.trace` runs one step of the real code on fake tensors; `estimate.plan` turns that into bytes, seconds and
utilisation of a device of `devices`; `advice.what_fits` looks for settings that need less.
"""
