"""A job of the size that people submit, whose rendering the tests of the backends compare."""

from cluster.launch.spec import CodeSpec, JobSpec

FNO = JobSpec(
    name="fno",
    command=("trainer", "fit", "s3://bucket/runs/fno"),
    run_url="s3://bucket/runs/fno",
    nodes=2,
    processes=8,
    accelerators=8,
    cpus=96,
    memory_gib=512,
    time_limit_s=4 * 3600,
    env={"NCCL_DEBUG": "WARN", "NOTE": "it's a test"},
    code=CodeSpec("path", "/shared/keel"),
    retries=3,
)
