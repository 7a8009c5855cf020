import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training extra is not installed")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_3():
    before = set((ROOT / "benchmarks/results").rglob("*"))
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert "torch sees no GPU" in done.stdout
    assert "Traceback" not in done.stderr
    assert set((ROOT / "benchmarks/results").rglob("*")) == before


def test_a_step_of_each_kind_is_timed():
    from benchmarks.gpu import check

    heads, rows = check.steps("cpu")
    assert len(heads) == 3
    assert {(row[0].split(",")[0].split(" ")[0], row[1]) for row in rows} == {
        (what, precision) for what in ("plain", "Bezier", "simplex") for precision in ("32", "bf16")
    }
    assert all(float(row[2]) > 0 for row in rows)
