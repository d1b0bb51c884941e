"""What of replicas needs no cluster: their numbers, their health, and what is said where Ray is missing."""

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alpaca_core.errors import HostUnavailable, InvalidRequest, LoadError
from alpaca_core.host.cluster import Replica, Replicas, bound, replicas_of
from alpaca_core.host.settings import Settings
from alpaca_core.spec import ModelSpec


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1.0), (2, 1, 1.0), (1, 1, -1.0), (1, 1, 1.5), (1, 1, float("nan")), (1, 1, float("inf"))]
)
def test_numbers_out_of_range_are_refused(numbers: tuple[int, int, float]) -> None:
    with pytest.raises(InvalidRequest):
        Replicas(*numbers)


def test_a_replica_has_the_gpus_that_its_spec_needs() -> None:
    assert replicas_of(ModelSpec(), 2, None, None) == Replicas(2, 2, 1.0)
    assert replicas_of(ModelSpec(device="cpu"), 1, 4, None) == Replicas(1, 4, 0.0)
    assert replicas_of(ModelSpec(engine="vllm", tensor_parallel_size=4), 1, None, None).gpus == 4.0
    assert replicas_of(ModelSpec(), 1, None, 0.5).gpus == 0.5


def test_without_ray_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'prefect-alpaca\[ray\]'"):
        bound(ModelSpec(), None, Replicas())


@pytest.mark.end_to_end
def test_a_replica_is_well_until_its_model_has_become_another(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))

    async def live() -> None:
        replica = Replica(ModelSpec(base_model=str(base), device="cpu"), Settings().served(), None)
        app = replica.__serve_build_asgi_app__()
        async with app.router.lifespan_context(app):
            await replica.check_health()  # waits for the model
            weights = load_file(base / "model.safetensors")
            save_file({name: 2 * each for name, each in weights.items()}, base / "model.safetensors")
            pid = replica.status().engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            for _ in range(600):
                await asyncio.sleep(0.1)
                await replica.check_health()
            pytest.fail("it is well without a model")

    with pytest.raises(HostUnavailable, match="state is 'failed'"):
        asyncio.run(live())


def test_a_replica_does_not_start_without_its_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        Replica(ModelSpec(base_model=str(tmp_path / "nothing")), Settings(), None)
