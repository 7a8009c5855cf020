import pytest

pytest.importorskip("tabulate", reason="the training extra is not installed")

from benchmarks.serving.throughput import parsed

PRINTED = """Running 5s test @ http://127.0.0.1:3000/predict
  1 threads and 64 connections
  Latency Distribution
     50%  {p50}
     75%  1.20s
     90%  1.31s
     99%  {p99}
  1203 requests in 5.01s, 410.00KB read
Requests/sec:    240.12
"""


@pytest.mark.parametrize(
    ("p50", "p99", "milliseconds"),
    [
        ("870.00us", "12.34ms", (0.87, 12.34)),
        ("950.20ms", "1.45s ", (950.2, 1450)),
        ("1.02s ", "1.10m ", (1020, 66000)),
    ],
)
def test_latencies_are_read_in_every_unit_that_wrk_prints(p50, p99, milliseconds):
    found = parsed(PRINTED.format(p50=p50, p99=p99))
    assert (found["p50"], found["p99"]) == pytest.approx(milliseconds)
    assert (found["requests"], found["rate"]) == (1203, 240.12)
