"""MLflow traces: one for each answer of a served version, linked to its LoggedModel, and what people say of it.

Foreign errors end here: whatever MLflow raises goes on as :class:`RegistryError`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from namesake.errors import RegistryError, said
from namesake.messages import tr

TRACE_ID = re.compile(r"tr-[0-9a-f]{32}")
"""MLflow's id of a trace: OpenTelemetry's 16 bytes in hexadecimal digits."""

_PREVIEW, _MOST, _RATIONALE = 1000, 250, 4096
_DEFAULT_EXPERIMENT = "0"
_MODEL_ID = re.compile(r"\b(m-[0-9a-f]{32})\b")


@dataclass(frozen=True)
class Answer:
    """One answer, as it is logged.

    Attributes:
        trace: the trace's id, :data:`TRACE_ID`.
        request: the request's id.
        route: what was asked, ``/v1/chat/completions``.
        served: the version that is served, ``models:/ccb/3``: says in which experiment the trace lies.
        version: the version that answered, ``models:/ccb/3``; empty for the base.
        run, model, alias: its training run, its model id ``ccb-v3``, and the alias it was chosen by.
        status: of the reply; 499 where the client has gone.
        begun, asked, ended: when the request came, when the engine was asked, when the reply had ended: nanoseconds
            since 1970.
        first: seconds from the question to the engine to the first byte of its reply; none where there was no reply.
        prompt, completion: tokens.
        session, user: the client's session and the name of its API key; empty where there is none.
        parameters: what the client set, ``temperature`` and the like.
        asked_for, said: request and reply, where texts are kept.
    """

    trace: str
    request: str
    route: str
    served: str
    version: str
    run: str
    model: str
    alias: str
    status: int
    begun: int
    asked: int
    ended: int
    first: float | None = None
    prompt: int = 0
    completion: int = 0
    session: str = ""
    user: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    asked_for: Mapping[str, Any] | None = None
    said: str | None = None


class NoTrace(Exception):
    """There is no trace of that id."""


class Traces:
    """Writes into the MLflow that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], tuple[str, str]] = {}

    def log(self, answers: Sequence[Answer]) -> None:
        """Log the answers: all of them, or as many as there were before the error.

        Raises:
            RegistryError: MLflow cannot be reached, or does not take them.
        """
        with _mapped("The traces could not be logged."):
            client = _client()
            by_experiment: dict[str, list[Any]] = defaultdict(list)
            try:
                for answer in answers:
                    experiment, model_id = self._place(answer)
                    client.start_trace(_info(answer, experiment, model_id))
                    by_experiment[experiment] += _spans(answer)
            finally:  # one that is not taken leaves no trace before it without spans
                for experiment, spans in by_experiment.items():
                    client.log_spans(experiment, spans)

    def feedback(self, trace: str, name: str, value: bool | float | str, rationale: str | None, source: str) -> str:
        """Log what somebody says of an answer; the assessment's id.

        What the same source said before under the same name is replaced: it stays in MLflow, marked as not valid.

        Args:
            source: who says it, the API key's name.

        Raises:
            NoTrace: there is no such trace.
            RegistryError: MLflow cannot be reached, or does not take it.
        """
        from mlflow.entities import AssessmentSource, AssessmentSourceType, Feedback

        with _mapped("The feedback could not be logged."):
            client = _client()
            known = _there(client.get_trace_info, trace)
            if known is None:
                raise NoTrace(trace)
            before = [
                one.assessment_id
                for one in known.assessments
                if one.name == name and one.source.source_id == source and one.feedback and one.valid is not False
            ]
            assessment = Feedback(
                name=name,
                value=value,
                rationale=_short(rationale, _RATIONALE) if rationale is not None else None,
                source=AssessmentSource(source_type=AssessmentSourceType.HUMAN, source_id=source),
                overrides=before[-1] if before else None,
            )
            return str(client.log_assessment(trace, assessment).assessment_id)

    def _place(self, answer: Answer) -> tuple[str, str]:
        """Experiment and LoggedModel of an answer; no model for the base's."""
        key = (answer.version or answer.served, answer.run)
        if key not in self._places:
            self._places[key] = _place_of(answer.version or answer.served)
        experiment, model_id = self._places[key]
        return experiment, model_id if answer.version else ""


def _place_of(uri: str) -> tuple[str, str]:
    """Experiment and LoggedModel of a registered version. Where the LoggedModel was deleted: the run's experiment."""
    import mlflow

    name, _, number = uri.removeprefix("models:/").rpartition("/")
    client = mlflow.MlflowClient()
    version = _there(lambda number: client.get_model_version(name, number), number)
    if version is None:  # it is served from the store all the same
        return _DEFAULT_EXPERIMENT, ""
    # MLflow's own stores do not keep a version's model id; it stands in the address of its files.
    found = _MODEL_ID.search(getattr(version, "model_id", None) or version.source)
    kept = _there(client.get_logged_model, found[1]) if found else None
    if kept is not None:
        return str(kept.experiment_id), str(kept.model_id)
    run = _there(client.get_run, version.run_id) if version.run_id else None
    return (str(run.info.experiment_id) if run is not None else _DEFAULT_EXPERIMENT), ""


def _there(get: Callable[[str], Any], name: str) -> Any:
    """What MLflow has under that name; none where it does not exist."""
    import mlflow

    try:
        return get(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _info(answer: Answer, experiment: str, model_id: str) -> Any:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.constant import TraceMetadataKey, TraceTagKey

    about = {
        TraceMetadataKey.MODEL_ID: model_id,
        TraceMetadataKey.TRACE_SESSION: _short(answer.session, _MOST),
        TraceMetadataKey.TRACE_USER: _short(answer.user, _MOST),
        TraceMetadataKey.TOKEN_USAGE: json.dumps(_usage(answer)),
    }
    tags = {
        TraceTagKey.TRACE_NAME: answer.route,
        "namesake.version": answer.model,
        "namesake.run": answer.run,
        "namesake.alias": answer.alias,
        "namesake.status": str(answer.status),
    }
    return TraceInfo(
        trace_id=answer.trace,
        client_request_id=answer.request,
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=answer.begun // 1_000_000,
        execution_duration=(answer.ended - answer.begun) // 1_000_000,
        state=TraceState.OK if answer.status < 400 else TraceState.ERROR,
        request_preview=_short(_last(answer.asked_for), _PREVIEW) if answer.asked_for is not None else None,
        response_preview=_short(answer.said, _PREVIEW) if answer.said is not None else None,
        trace_metadata={key: value for key, value in about.items() if value},
        tags={key: value for key, value in tags.items() if value},
    )


def _spans(answer: Answer) -> Iterator[Any]:
    """The answer from the request's first byte to the reply's last, and in it what the engine took of that."""
    from mlflow.entities import SpanType
    from mlflow.tracing.constant import SpanAttributeKey

    # OpenTelemetry's names, https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/
    about: dict[str, Any] = {
        SpanAttributeKey.SPAN_TYPE: SpanType.CHAT_MODEL,
        SpanAttributeKey.CHAT_USAGE: _usage(answer),
        SpanAttributeKey.MODEL: answer.model,
        "http.route": answer.route,
        "http.response.status_code": answer.status,
        "namesake.request": answer.request,
        "namesake.version": answer.version,
        "namesake.run": answer.run,
        "namesake.alias": answer.alias,
        "session.id": _short(answer.session, _MOST),
        "user.id": _short(answer.user, _MOST),
        "gen_ai.response.model": answer.model,
        "gen_ai.usage.input_tokens": answer.prompt,
        "gen_ai.usage.output_tokens": answer.completion,
        **{f"gen_ai.request.{name}": value for name, value in answer.parameters.items()},
    }
    if answer.asked_for is not None:
        about[SpanAttributeKey.INPUTS] = answer.asked_for
        about[SpanAttributeKey.MESSAGE_FORMAT] = "openai"
    if answer.said is not None:
        choice = {"index": 0, "message": {"role": "assistant", "content": answer.said}}
        about[SpanAttributeKey.OUTPUTS] = {"object": "chat.completion", "choices": [choice]}
    yield _span(answer, "answer", answer.begun, about)
    engine = {SpanAttributeKey.SPAN_TYPE: SpanType.LLM, "gen_ai.response.time_to_first_chunk": answer.first}
    first = [("first byte", answer.asked + int(answer.first * 1e9))] if answer.first is not None else []
    yield _span(answer, "engine", answer.asked, engine, first, child=True)


def _span(
    answer: Answer,
    name: str,
    begun: int,
    about: Mapping[str, Any],
    events: Sequence[tuple[str, int]] = (),
    *,
    child: bool = False,
) -> Any:
    from mlflow.entities import Span
    from mlflow.tracing.constant import SpanAttributeKey

    trace = answer.trace.removeprefix("tr-")
    # Two spans a trace: their ids are told apart by the half of the trace's that they are.
    root, inner = trace[:16], trace[16:]
    given = {SpanAttributeKey.REQUEST_ID: answer.trace, **about}
    return Span.from_dict(
        {
            "trace_id": answer.trace,
            "span_id": inner if child else root,
            "parent_span_id": root if child else None,
            "name": name,
            "start_time_unix_nano": begun,
            "end_time_unix_nano": answer.ended,
            "status": {"code": "OK" if answer.status < 400 else "ERROR", "message": ""},
            "attributes": {
                key: json.dumps(value, ensure_ascii=False) for key, value in given.items() if value not in ("", None)
            },
            "events": [{"name": text, "time_unix_nano": at} for text, at in events],
        }
    )


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "input_tokens": answer.prompt,
        "output_tokens": answer.completion,
        "total_tokens": answer.prompt + answer.completion,
    }


def _short(text: str, most: int) -> str:
    """What a column takes: so many characters, and (PostgreSQL) no NUL, for which it would refuse a whole batch."""
    return text[:most].replace("\0", "\N{REPLACEMENT CHARACTER}")


def _last(asked: Mapping[str, Any]) -> str:
    """What was asked last, for MLflow's list of traces."""
    given = asked.get("messages") or asked.get("input") or asked.get("prompt") or ""
    last = given[-1] if isinstance(given, list) else given
    content = last.get("content", last) if isinstance(last, dict) else last
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _client() -> Any:
    from mlflow.tracing.client import TracingClient

    return TracingClient()


@contextmanager
def _mapped(message: str) -> Iterator[None]:
    try:
        yield
    except NoTrace:
        raise
    except Exception as error:  # MLflow raises its own, sqlalchemy's, requests' and the stores' errors
        raise RegistryError(tr("{message} ({error})", message=message, error=said(error))) from error
