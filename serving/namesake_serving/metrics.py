"""The gateway's own figures, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from namesake.registry import Version

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REASONS = {
    "adapter": "An adapter of a kind that vLLM does not serve.",
    "base": "Trained on another base, or its base is not to be had.",
    "damaged": "Files that are not what the manifest says, are cut short, may hold code, or hold no numbers.",
    "engine": "The engine would not load it, died of it, or did not come up.",
    "gate": "It did not pass the gate, and `--require-gate` is on.",
    "memory": "No memory for a second engine, or no place for an adapter.",
    "other": "Anything else: a full disk.",
    "proof": "It does not answer as it did when it was promoted.",
    "rank": "A greater rank than the engine has room for.",
    "registry": "MLflow does not have its files, or does not answer.",
    "signature": "Not signed, or not by the key, and `--public-key` is given.",
}
"""Why a version is not served, for those who count."""


class Metrics:
    """One registry for one server; names begin with ``namesake_``."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "namesake_requests",
            "Requests by route, status and version.",
            ("route", "status", "version"),
            registry=registry,
        )
        self.tokens = Counter(
            "namesake_tokens",
            "Tokens by kind (prompt, completion) and version.",
            ("kind", "version"),
            registry=registry,
        )
        self.first_token = Histogram(
            "namesake_time_to_first_token_seconds",
            "From the request's last byte to the reply's first.",
            ("version",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge("namesake_requests_running", "Requests under way or waiting.", registry=registry)
        self.registry_errors = Counter(
            "namesake_registry_errors", "Questions to the registry that failed.", registry=registry
        )
        self.webhooks = Counter("namesake_webhooks", "Signed calls of MLflow's webhook.", registry=registry)
        self.traces = Counter(
            "namesake_traces",
            "Traces by result: logged, failed (MLflow did not take them), or dropped because enough were waiting.",
            ("result",),
            registry=registry,
        )
        self.feedback = Counter(
            "namesake_feedback",
            "Feedback by result: logged, unknown (there is no such trace), or failed (MLflow did not take it).",
            ("result",),
            registry=registry,
        )
        self.engine_restarts = Counter(
            "namesake_engine_restarts", "Engines that ended by themselves and were started again.", registry=registry
        )
        self._changes = Counter(
            "namesake_version_changes",
            "Changes of version by result (live, refused), way, and of those refused the reason.",
            ("result", "way", "reason"),
            registry=registry,
        )
        self._change_seconds = Histogram(
            "namesake_version_change_seconds",
            "From fetched and verified to live.",
            ("way",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.canary_returns = Counter(
            "namesake_canary_returns",
            "Challengers that left the bounds of the canary and answer no more.",
            registry=registry,
        )
        self.shadow = Counter(
            "namesake_shadow",
            "Copies of requests for the challenger by result: kept, failed, or left out because enough were under way.",
            ("result",),
            registry=registry,
        )
        self._rival = Gauge(
            "namesake_challenger_version",
            "Number of the challenger that answers a share or a copy of the requests; 0: none does.",
            registry=registry,
        )
        self.standby = Gauge(
            "namesake_standby_ready",
            "1: a standby is ready for the next version, or for an engine that dies.",
            registry=registry,
        )
        self._served = Gauge("namesake_served_version", "Number of the version that answers.", registry=registry)
        self._asked = Gauge(
            "namesake_registry_answered_timestamp_seconds",
            "When the registry last said where the alias points, in seconds since 1970.",
            registry=registry,
        )
        self._wanted = Gauge("namesake_alias_version", "Number of the version the alias points to.", registry=registry)

    def served(self, version: Version) -> None:
        """This version answers now."""
        self._served.set(version.number)

    def rival(self, version: Version | None) -> None:
        """This version is the challenger now, or none is."""
        self._rival.set(version.number if version is not None else 0)

    def wanted(self, version: Version) -> None:
        """The alias points to it, says the registry."""
        self._asked.set_to_current_time()
        self._wanted.set(version.number)

    def changed(self, way: str, seconds: float) -> None:
        """A version went live."""
        self._changes.labels("live", way, "").inc()
        self._change_seconds.labels(way).observe(seconds)

    def refused(self, reason: str) -> None:
        """A version was not served, for one of :data:`REASONS`."""
        self._changes.labels("refused", "", reason if reason in REASONS else "other").inc()

    def text(self) -> bytes:
        """Everything, as ``/metrics`` gives it."""
        return bytes(generate_latest(self._registry))
