"""Whatever JSON can say, and that at every place of what is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def altered(value: Any, other: object) -> Iterator[Any]:
    """The value with another one at each place within it."""
    yield other
    for place in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for inner in altered(value[place], other):
            whole = value.copy()
            whole[place] = inner
            yield whole
