"""What `python -m benchmarks demo` trains and writes."""

import pytest
import torch

from benchmarks.environment import read_csv
from tests.shared.benchmarks import status

demo = pytest.importorskip("benchmarks.demo", reason="needs the extra 'bench'")


@pytest.mark.full
def test_twins_train_alike(monkeypatch, tmp_path, capsys, one_thread):
    monkeypatch.setattr(demo, "ACTIVATIONS", demo.ACTIVATIONS[:2])
    times = {demo.OWN: 0.002, "naive formula": 0.003}
    columns = {"ReLU6\nforward": times}  # to compile takes half a minute
    monkeypatch.setattr(demo, "measure_all", lambda device, failures: columns)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert status("demo", "--epochs", 1, "--seeds", 2, "--results", tmp_path) == 0
    rows = read_csv(tmp_path / "demo.csv")
    found = {modules: [] for modules in ("torch", "fused_act")}
    for row in rows:
        found[row["modules"]].append((row["activation"], row["seed"], row["loss"], row["accuracy"]))
    assert [each[:2] for each in found["torch"]] == [
        (name, seed) for name in ("ReLU6", "Swish") for seed in "01"
    ]
    if not torch.cuda.is_available():
        assert found["torch"] == found["fused_act"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"demo.png", "curves.png"}
    output = capsys.readouterr().out
    assert "1.50" in output
    assert f"the pictures are {tmp_path / 'curves.png'} and {tmp_path / 'demo.png'}." in output


def test_twins_that_differ_end_the_demo():
    activation = demo.ACTIVATIONS[0]
    twins = {name: demo.Training(torch.nn.Linear(1, 1), 1) for name in ("torch", "fused_act")}
    twins["torch"].losses, twins["fused_act"].losses = [1.0, 2.0], [1.0, 2.5]
    with pytest.raises(SystemExit, match=r"ReLU6, seed 3, step 1 is 2\.5 with fused_act's"):
        demo.require_equal_losses(activation, 3, twins)
