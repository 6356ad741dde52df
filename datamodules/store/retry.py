"""Retries with exponential back-off, full jitter and a deadline: the only retries in Keel's storage path.

The libraries below (s3fs, botocore) are configured not to retry, so that the deadline means what it says.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# HTTP answers that a later attempt may not get: time-out, conflict of conditional writes, throttling, server faults.
TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# Error codes that some servers send with a status of 400; and, with 403, of a clock that has jumped and will be set right.
SKEWED = "RequestTimeTooSkewed"
TRANSIENT_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError", SKEWED}
)
TRANSIENT_ERRNO = frozenset(
    {errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, errno.EAGAIN}
)
# Exceptions of optional libraries, by class name so that nothing has to be imported to recognise them.
CONNECT_NAMES = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ClientConnectorError", "gaierror"}
)
TRANSIENT_NAMES = CONNECT_NAMES | frozenset(
    {
        "HTTPClientError",  # botocore: connection closed, read time-out, broken body
        "ResponseStreamingError",
        "IncompleteReadError",
        "IncompleteRead",
        "SSLEOFError",  # the connection ended in the middle
        "FlexibleChecksumError",
        "ResponseParserError",
        "ClientPayloadError",
        "ServerDisconnectedError",
        "FSTimeoutError",
    }
)


def chain(error: BaseException | None) -> list[BaseException]:
    """The error and what caused it, outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for link in chain(error) for cls in type(link).__mro__}


def response_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a botocore ClientError in the chain; (0, "") if there is none."""
    for link in chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status or 0), str(response.get("Error", {}).get("Code", ""))
    return 0, ""


def is_connect_fault(error: BaseException) -> bool:
    """True where no connection to the endpoint came about at all."""
    return isinstance(error, ConnectionRefusedError) or bool(_names(error) & CONNECT_NAMES)


def is_transient(error: BaseException) -> bool:
    """True where the same request may succeed a little later."""
    status, code = response_of(error)
    if status or code:
        return status in TRANSIENT_STATUS or code in TRANSIENT_CODES
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO:
        return True
    return bool(_names(error) & TRANSIENT_NAMES)


@dataclass
class Retry:
    """When to try again. Time and chance are fields so that tests can inject them.

    deadline: seconds from the first attempt after which no further one starts.
    connect_deadline: the same while the endpoint has never answered this process: a wrong address is told soon,
        a server that restarts under a running job gets the full `deadline`.
    """

    deadline: float = 60.0
    connect_deadline: float = 10.0
    base: float = 0.1
    cap: float = 5.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform

    def run(self, attempt: Callable[[int], T], reached: Callable[[], bool]) -> T:
        """`attempt(n)` for n = 0, 1, ... until it returns, fails for good, or time is up; raises its last error."""
        start, n = self.clock(), 0
        while True:
            try:
                return attempt(n)
            except Exception as error:
                if not is_transient(error):
                    raise
                never_reached = is_connect_fault(error) and not reached()
                limit = min(self.deadline, self.connect_deadline) if never_reached else self.deadline
                pause = self.uniform(0.0, min(self.cap, self.base * 2.0**n))
                if self.clock() - start + pause >= limit:
                    raise
            self.sleep(pause)
            n += 1
