"""The examples that people copy run as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.end_to_end
def test_the_four_uses_run_on_the_embedded_model() -> None:
    command = [sys.executable, "examples/uses.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    parts = done.stdout.strip().split("\n\n")
    shown = [re.findall(r"^  (\d\.\d\d) ", part, re.MULTILINE) for part in parts]
    assert [len(numbers) for numbers in shown] == [3, 2, 2, 2]
    assert all(0 <= float(number) <= 1 for numbers in shown[:3] for number in numbers)
    assert all(1 <= float(number) <= 5 for number in shown[3])
    assert shown[2] == sorted(shown[2], reverse=True), "the likeliest outlier first"
    assert "exchange rate: How many euros do I get for a dollar?" in done.stdout
    assert "failed" not in done.stdout
