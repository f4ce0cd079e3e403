"""The JSON that other programs read, and the table."""

from __future__ import annotations

import json

import numpy as np

from mlc_llm.bench.report import HEADER, peak_rss_bytes

from .fakes import make_decode, make_prefill, make_report


def test_json_has_all_figures() -> None:
    report = make_report(make_prefill(), make_decode(batch=4, context=64), compile_s=12.5)
    found = json.loads(json.dumps(report.to_json()))
    versions = found.pop("versions")
    assert set(versions) == {"mlc_llm", "python", "apache-tvm", "apache-tvm-ffi", "numpy"}
    assert versions["numpy"] == np.__version__
    prefill, decode = found.pop("measurements")
    assert found == {
        "model": "tiny",
        "quantization": "q4f16_1",
        "device": "cpu:0",
        "opt": "O2",
        "threads": 2,
        "bandwidth_gb_s": 20.0,
        "weight_bytes": 2_000_000_000,
        "peak_rss_bytes": 3_000_000_000,
        "load_s": 0.25,
        "compile_s": 12.5,
    }
    assert decode == {
        "name": "decode",
        "tokens": 10,
        "batch": 4,
        "context": 64,
        "tokens_per_s": 20.0,
        "min": 10.0,
        "max": 40.0,
        "runs": [1.0, 4.0, 2.0],
        "read_gb_s": 10.0,
        "bandwidth_gb_s": 20.0,
    }
    assert set(prefill) == set(decode)
    assert (prefill["name"], prefill["batch"], prefill["context"]) == ("prefill", 1, 0)
    assert prefill["read_gb_s"] is None


def test_rows_have_the_figures_for_people() -> None:
    rows = make_report(make_prefill(1000), make_decode(batch=4)).rows()
    assert rows == [
        ("prefill 1,000", "750.0", "(500.0 - 1,000.0)", "1.50", "", ""),
        ("decode 10, batch 4, context 32", "20.0", "(10.0 - 40.0)", "200.00", "10.0", "50 %"),
    ]
    assert len(HEADER) == len(rows[0])


def test_the_summary_says_what_it_knows() -> None:
    text = make_report(make_decode()).summary()
    assert text == (
        "weights read a step 2,000.0 MB, read bandwidth 20.0 GB/s, peak memory 3,000 MB, "
        "loaded in 0.25 s"
    )
    text = make_report(make_decode(), compile_s=3.0).summary()
    assert text.endswith(
        "peak memory 3,000 MB with the compiler, loaded in 0.25 s, compiled in 3.0 s"
    )
    assert "peak" not in make_report(make_decode(), peak_rss_bytes=None).summary()


def test_peak_memory_grows_with_memory() -> None:
    before = peak_rss_bytes()
    assert before is None or before > 10_000_000
    if before is not None:
        held = np.ones(before + 50_000_000, np.uint8)
        after = peak_rss_bytes()
        assert after is not None and after >= before + 40_000_000
        assert len(held) > before
