"""What `python -m benchmarks memory` counts."""

import pytest

from benchmarks import memory, providers
from fused_act.activations import ROWS
from tests.shared.benchmarks import provider_called


@pytest.mark.full
def test_memory_of_a_stack(monkeypatch):
    monkeypatch.setattr(memory, "ROUNDS", 1)
    monkeypatch.setattr(memory, "SECONDS", 0.001)
    compared = [providers.FALLBACK, provider_called("aten")]
    name = "conv-norm-act stack"
    contenders = [
        memory.Contender(provider, False, method)
        for provider in compared
        for method in memory.METHODS
    ]
    contenders = [each for each in contenders if each.can(ROWS["mish"], memory.MODELS[name], False)]
    rows = {
        (row["provider"], row["method"]): row
        for row in memory.rows_of(ROWS["mish"], "fp32", name, contenders)
    }
    found = {
        key: [row[column] for column in ("by_activations", "by_norms", "by_layers")]
        for key, row in rows.items()
    }
    # Six layers, 4 bytes an element: all inputs but the first convolution's, which is the data.
    everything = [4.0, pytest.approx(4.0, rel=0.01), pytest.approx(4 * 5 / 6, rel=0.01)]
    assert found == {
        ("fallback", ""): everything,
        ("fallback", "rematerialize"): [4.0, everything[1], 0.0],
        ("fallback", "rematerialize-norm"): [0.0, everything[1], 0.0],
        ("aten", ""): everything,
        ("aten", "checkpoint"): ["", "", ""],
    }
    for (_, method), row in rows.items():
        assert row["ms"] > 0
        if method != "checkpoint":
            parts = [row[column] for column in memory.KINDS]
            assert row["saved_bytes"] == pytest.approx(sum(parts))
    assert rows["aten", "checkpoint"]["saved_bytes"] < 4.0


@pytest.mark.interpreted
def test_memory_of_a_mask():
    contender = memory.Contender(provider_called("triton"), True, "")
    (row,) = memory.rows_of(ROWS["relu6"], "bf16", "alone", [contender])
    assert [row[kind] for kind in memory.KINDS] == [1 / 8, 0, 0, 0, 0]
    assert row["saved_bytes"] == 1 / 8
