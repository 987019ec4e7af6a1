"""Every error Namesake raises on purpose.

The tree::

    NamesakeError                 exit 1
    ├── InputError                exit 2   a value the user gave: parameter, value and mend
    │   ├── IdentityError                  a name or an author
    │   ├── RecipeError                    a recipe file or an override of it
    │   └── DataError                      rows of a data set
    ├── BaseModelError            exit 3   base weights that cannot be had or are not what they should be
    ├── TrainingError             exit 4   ms-swift failed
    ├── TrackingError             exit 5   the MLflow tracking server or store
    ├── RegistryError             exit 6   the MLflow model registry
    ├── PromotionError            exit 7   a version that may not, or could not, be made
    ├── ServingError              exit 8   vLLM, or an endpoint that does not answer
    ├── HubError                  exit 10  a model hub that cannot be reached or refuses
    └── HarnessError              exit 11  lm-eval is not installed, or failed

Errors of a vendor (mlflow, swift, vllm, transformers, lm_eval) end at the one module that imports it and go on as one
of these, with the vendor's own words in ``__cause__``.
"""

from __future__ import annotations

from namesake.messages import tr, translated

_SHOWN = 80
"""How many characters of a bad value a message repeats."""

_SHOWN_OF_ITS_END = 30
"""How many of them are its last: of a long path the file's name is what tells it from others."""


class NamesakeError(Exception):
    """Root of the tree. ``mend`` says in one sentence what the user can do about it.

    ``kind`` says in one word what it is about, where faults are counted; it is empty where nobody counts it.
    """

    exit_code = 1

    def __init__(self, message: str, *, mend: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.message} {self.mend}".strip()

    def told(self) -> str:
        """Message and mend as the terminal shows them, in the user's language."""
        lines = [tr("error: {message}", message=self.message)]
        lines += [tr("  mend: {mend}", mend=self.mend)] if self.mend else []
        return "\n".join(map(translated, lines))


class InputError(NamesakeError):
    """A value the user gave is refused: names the parameter, shows the value, says the mend."""

    exit_code = 2

    def __init__(self, parameter: str, value: object, fault: str, *, mend: str) -> None:
        self.parameter = parameter
        self.value = value
        self.fault = fault
        message = tr("{parameter}={value}: {fault}.", parameter=parameter, value=shown(value), fault=fault)
        super().__init__(message, mend=mend)


class IdentityError(InputError):
    """A name or an author is not *Chinese name, one space, English name*."""


class RecipeError(InputError):
    """A recipe or an override of it is wrong."""


class DataError(InputError):
    """A data set holds a row that must not be trained on."""


class BaseModelError(NamesakeError):
    """Base weights cannot be had or are not what they should be."""

    exit_code = 3


class TrainingError(NamesakeError):
    """ms-swift failed; its log says where."""

    exit_code = 4


class TrackingError(NamesakeError):
    """The MLflow tracking server or store cannot be used."""

    exit_code = 5


class RegistryError(NamesakeError):
    """The MLflow model registry has no such model, version or alias, or cannot be used."""

    exit_code = 6


class PromotionError(NamesakeError):
    """A version that may not, or could not, be made."""

    exit_code = 7


class ServingError(NamesakeError):
    """vLLM cannot be started, died, or an endpoint does not answer."""

    exit_code = 8


class HubError(NamesakeError):
    """A model hub cannot be reached, refuses the token, or did not take the files."""

    exit_code = 10


class HarnessError(NamesakeError):
    """The evaluation harness, lm-eval, is not installed, or failed."""

    exit_code = 11


class Stopped(Exception):
    """No fault: a run is ended before its end because what was seen of it is enough. ``why`` stays on the run."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def said(error: BaseException) -> str:
    """What a vendor's error says, in one line; SQLAlchemy's may begin with a remark on when it happened."""
    lines = (line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of"))
    return next(lines, type(error).__name__)


def shown(value: object) -> str:
    """The value as a message repeats it: quoted, control characters escaped, its middle left out where it is long."""
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    cut = f"{text[: _SHOWN - _SHOWN_OF_ITS_END]}…{text[-_SHOWN_OF_ITS_END:]}"
    return tr("{text} ({count:,} characters)", text=cut, count=len(str(value)))
