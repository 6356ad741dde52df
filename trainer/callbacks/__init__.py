"""What watches a run, one callback per file.

Lightning calls callbacks in list order, so the order is part of the contract:

1. `Watchdog`        notes in which phase of which step the process is
2. `StreamPosition`  moves the data stream on; `SkipWindow` moves it over samples that a rollback leaves out
3. `DiagnosticsLog`  hands its measurements of the finished step to the metrics log, as `Guard` does with its judgement
4. `Parity`          compares replicas before anything is saved
5. `MetricsLog`      closes the step; every k steps one reduction, one transfer, rows to the writer and to listeners
6. `Recovery`, `Preemption`  decide whether training goes on
7. checkpointing     calls `MetricsLog.flush()` on all ranks before it commits: no row up to a committed step is lost
   `Pruning`         asks at validations whether the run is worth going on with
8. `Progress`        listens to the metrics log
9. `Heartbeat`       tells the store now and then, by a thread, where the run stands
10. `Throughput`     last: what it sees between its two hooks is the wait for the next batch and nothing else

Between its k-th steps none of them reads the device; only `Guard`, where it is on, talks to other ranks in each step.
"""
