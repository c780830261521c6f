"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, not about the code. In CI the same
# examples are drawn every time; elsewhere new ones, so that the search goes on.
settings.register_profile(
    "narrows",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("narrows")
