"""The one exception tree. Services map `status` and `code` to problem+json; nothing else leaks.

OneSearchError
 ├── ConfigError      a recipe, setting or environment variable is wrong
 ├── InputError       a request field is wrong (names the field)
 ├── DataError        a table is wrong (lists every fault of the file, capped)
 ├── BundleError      a bundle is missing, damaged or foreign (lists every fault)
 ├── DecodeError      the model produced something that cannot be searched (NaN or infinite logits)
 ├── DivergedError    training left the numbers: a loss that is not finite, rollouts that drifted
 ├── DeadlineError    a search was given up because its time had run out
 ├── ProviderError    a keyword provider or language model gave no usable answer
 └── ExportError      a graph cannot be exported or misses its parity gate
"""

from collections.abc import Sequence


class OneSearchError(Exception):
    """Base of all errors raised on purpose. `code` is stable; `status` is the HTTP status."""

    code = "error"
    status = 500


class ConfigError(OneSearchError):
    """A recipe key, setting or environment variable is unknown or has a wrong value."""

    code = "config"


class InputError(OneSearchError):
    """A request field is wrong. `field` names it."""

    code = "invalid-input"
    status = 422

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class FaultsError(OneSearchError):
    """An error that lists every fault found at once."""

    def __init__(self, subject: str, faults: Sequence[str]) -> None:
        self.subject = subject
        self.faults = tuple(faults)
        super().__init__("\n  - ".join([f"{subject}: {len(self.faults)} fault(s)", *self.faults]))


class DataError(FaultsError):
    """A data table is wrong."""

    code = "data"


class BundleError(FaultsError):
    """A bundle is missing, damaged or was made by another contract."""

    code = "bundle"


class DecodeError(OneSearchError):
    """The model returned logits that are not finite or have a wrong shape."""

    code = "decode"


class DivergedError(OneSearchError):
    """Training cannot go on: its loss is not finite, or rollouts are not of the policy that learns from them."""

    code = "diverged"


class DeadlineError(OneSearchError):
    """The time that a search was given has run out; its remaining work was not started."""

    code = "deadline-exceeded"
    status = 503


class ProviderError(OneSearchError):
    """A keyword provider or the language model behind it gave no usable answer; trying again may help."""

    code = "provider"


class ExportError(FaultsError):
    """A graph cannot be exported or misses its parity gate."""

    code = "export"
