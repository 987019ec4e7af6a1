"""Settings of hypothesis: the same examples every time, no clock on a busy machine, no files in the checkout."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import configuration, settings

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "namesake-hypothesis")
settings.register_profile("namesake", deadline=None, derandomize=True, database=None)
settings.load_profile("namesake")
