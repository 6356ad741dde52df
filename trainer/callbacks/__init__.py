"""What watches a run, one callback per file.

Lightning calls callbacks in list order, so the order is part of the contract:

1. `DiagnosticsLog`  hands its measurements of the finished step to the metrics log
2. `MetricsLog`      closes the step; every k steps one reduction, one transfer, rows to the writer and to listeners
3. checkpointing     calls `MetricsLog.flush()` on all ranks before it commits: no row up to a committed step is lost
4. `Progress`        listens to the metrics log
5. `Throughput`      last: what it sees between its two hooks is the wait for the next batch and nothing else

Between its k-th steps none of them reads the device or talks to another rank.
"""
