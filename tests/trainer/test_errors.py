"""What an error is to a launcher."""

import math

import pytest
from fsspec.config import conf

from datamodules.store import AccessDenied, NotFound, OutOfSpace, Store, Unreachable
from trainer import restarts
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.errors import Defect, exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unreachable("s3://b/k: the store did not answer in time"), 69),
        (ConnectionResetError("reset"), 69),
        (AccessDenied("s3://b/k: access denied"), 2),
        (OutOfSpace("/full: no space left"), 2),
        (NotFound("s3://b/k: not found"), 2),
        (ConfigError("model.width=0"), 2),
        (CheckpointError("damaged"), 2),
        (Defect("replicas differ"), 1),
        (RuntimeError("a defect"), 1),
    ],
)
def test_only_what_may_pass_by_itself_is_worth_another_start(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_after_a_restart_an_address_that_was_right_before_gets_the_full_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(conf, "keel", {"deadline": 33.0})
    restarts.be_patient()
    assert Store("s3://bucket/run").retry.connect_deadline < 33.0  # the first start: it may be wrong
    monkeypatch.setenv(restarts.COUNT, "1")
    restarts.be_patient()
    retry = Store("s3://bucket/run").retry
    assert retry.deadline == 33.0 and retry.connect_deadline == math.inf
    monkeypatch.setitem(conf, "keel", {"connect_deadline": 5.0})
    restarts.be_patient()
    assert Store("s3://bucket/run").retry.connect_deadline == 5.0  # as the user says
