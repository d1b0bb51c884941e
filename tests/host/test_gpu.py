"""What only a GPU can do to a host: an assertion that fails there, after which nothing more can be computed."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from alpaca_core.host.launcher import at_host
from alpaca_core.model import GenerateRow, RowError
from alpaca_core.spec import Sampling
from tests.host.conftest import ADAPTERS, ASSERTER, engines, host_of, in_process, spec_of
from tests.host.test_chaos import long_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")


@pytest.mark.end_to_end
def test_a_row_that_fails_an_assertion_on_the_gpu_costs_itself_alone(base: Path, deadly: Path) -> None:
    spec = spec_of(base, *ADAPTERS, device="cuda")
    good = long_rows(12, 30)
    with in_process(spec) as alone:
        expected = [found for _, found in sorted(alone.generate(good), key=lambda each: each[0])]
    with at_host(spec, "auto") as model, at_host(spec, "auto") as neighbour, ThreadPoolExecutor(1) as pool:
        bad = GenerateRow((ASSERTER, 1), Sampling(max_new_tokens=5))
        began = time.monotonic()
        theirs = pool.submit(lambda: dict(neighbour.generate(good)))
        mine = dict(model.generate([*good[:3], bad, *good[3:]]))
        took = time.monotonic() - began
        error = mine.pop(3)
        assert isinstance(error, RowError)
        assert error.code == "engine_failed"
        assert [found for _, found in sorted(mine.items())] == expected
        assert [found for _, found in sorted(theirs.result(240.0).items())] == expected
        status = host_of(deadly)
        assert status is not None
        assert status.restarts in {2, 3}  # of it alone, after once or twice among others
        assert len(engines(deadly)) == 1
    print(f"{status.restarts} engines replaced, and all rows run again, in {took:.1f} s")
