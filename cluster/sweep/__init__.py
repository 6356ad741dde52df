"""Sweeps: many runs from one config, each done once, whoever does them.

    space  ->  table  ->  claims  ->  runs  ->  results  ->  `keel fit`

- A sweep's config (`config`) expands (`space`) into a table of rows (`table`). A row's id is the hash of its run's
  resolved config, so the same run is the same row in whatever sweep or order it is written.
- Whoever does rows is a driver (`sweep.Sweep`). It claims rows before it starts them (`claims`), tells the store that it
  lives, and adds each outcome to the results (`results`). What is missing is what has no result: all state is in the
  store, and any number of drivers, started at any time, share the work.
- Where rows run is an executor (`executor`): one file each, named below.

Below the sweep's URL lie

- `sweep.json`                the config, and which table is the present one
- `tables/<hash>.jsonl`       a table: the base config, then one line per row
- `added/<hash>/NNNNNNNN.json`  the rows that drivers add while they run, over the base of that hash, one order for all
- `claims/NNNNNNNN.json`      the log of claims
- `owners/<driver>.json`      heartbeats; `owners/<driver>.dead` fences a driver that was given up
- `records/*.jsonl`           results, one line per row, compacted now and then
- `runs/<id>/`                a run as `keel train` writes it
"""

# Name -> "module:Class" (see `cluster.sweep.executor.Executor`).
EXECUTORS = {
    "local": "cluster.sweep.local:Local",
    "packed": "cluster.sweep.packed:Packed",
    "ray": "cluster.sweep.tune:Tune",
}
