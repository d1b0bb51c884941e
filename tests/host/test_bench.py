"""The measurement of a host runs, at the smallest size, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.end_to_end
def test_clients_of_four_adapters_get_what_one_client_gets(base: Path, cache: Path, tmp_path: Path) -> None:
    adapters = [base.parent / f"{base.name}-adapters" / name for name in ("", "pirate", "poet", "clerk")]
    sizes = ["--device", "cpu", "--batch", "8", "--clients", "8", "--rows", "8", "--tokens", "8", "--repeat", "1"]
    command = [sys.executable, ROOT / "bench" / "host.py", "--model", base, "--adapter", *adapters, *sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPACA_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        done = subprocess.run(
            [*map(str, command), "--out", str(tmp_path / "host.json")], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "host.json").read_text())
    assert figures["same"]
    assert figures["ratio"] > 0
    assert figures["many"]["worst_wait_over_median"] >= 1
    assert len(figures["mib"]["hosts"]) == len(figures["mib"]["engines"]) == 1
    assert figures["second_run"][0]["open"] < figures["alone"]["open"]
