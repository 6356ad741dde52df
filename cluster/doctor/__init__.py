"""Checks a machine or an allocation before it trains: is all equal on all nodes, is anything slow, does the store hold.

`worker` measures, on every rank, and rank 0 writes `doctor.json`; `findings` judges, without looking at anything else.
"""

REPORT = "doctor.json"
