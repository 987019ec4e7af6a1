"""MLflow's webhook: a signed call that an alias has moved. It only wakes the poll; what moved is asked of the registry.

The signature is ``v1,base64(HMAC-SHA256(secret, "{delivery id}.{timestamp}.{body}"))``
(https://mlflow.org/docs/latest/ml/webhooks/).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

PATH = "/webhooks/mlflow"

TOLERANCE = 300.0
"""Seconds that a call's timestamp may lie off; deliveries are remembered for as long, so none counts twice."""

_MOST = 10_000


class Webhook:
    """Checks calls against the secret that MLflow signs them with."""

    def __init__(self, secret: str, now: Callable[[], float] = time.time) -> None:
        self._secret, self._now = secret.encode(), now
        self._seen: OrderedDict[str, float] = OrderedDict()

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Let the call in.

        Args:
            headers: by name in lower case.

        Raises:
            ValueError: it is not signed with the secret, too old, or was delivered before; the text says which.
        """
        delivery, stamp = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
        signed = f"{delivery}.{stamp}.".encode("utf-8", "surrogateescape") + body
        wanted = "v1," + base64.b64encode(hmac.new(self._secret, signed, hashlib.sha256).digest()).decode()
        given = headers.get("x-mlflow-signature", "").encode("utf-8", "surrogateescape")
        if not delivery or not hmac.compare_digest(wanted.encode(), given):
            raise ValueError("The signature is not right.")
        now = self._now()
        if not (stamp.isascii() and stamp.isdigit() and abs(now - int(stamp[:20])) <= TOLERANCE):
            raise ValueError("The timestamp is too far off.")
        while self._seen and next(iter(self._seen.values())) < now - 2 * TOLERANCE:
            self._seen.popitem(last=False)
        if delivery in self._seen or len(self._seen) >= _MOST:
            raise ValueError("This delivery was taken before.")
        self._seen[delivery] = now
