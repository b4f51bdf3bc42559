"""What the tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlv2v import _native


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    usual = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(usual)
