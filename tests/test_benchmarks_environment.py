"""What the benchmarks write and exit with, and whose clocks they read."""

import signal
import types

import pytest
import torch

from benchmarks import environment, providers
from benchmarks.environment import read_csv


def rows_then(*values, error):
    yield from ({"value": value} for value in values)
    raise error


# Rows and exit status


def test_rows_are_in_the_file_as_they_come(tmp_path):
    path = tmp_path / "new" / "speed.csv"
    partial = path.with_name("speed.partial.csv")

    def rows():
        for value in ("1", "2"):
            yield {"value": value}
            assert [row["value"] for row in read_csv(partial)][-1] == value
        yield {"value": "3", "more": "4"}
        assert [row["more"] for row in read_csv(partial)] == ["", "", "4"]

    returned = environment.write_csv(path, rows())
    assert [row["value"] for row in returned] == ["1", "2", "3"]
    assert [row["value"] for row in read_csv(path)] == ["1", "2", "3"]
    assert read_csv(path)[0]["torch"] == torch.__version__
    assert not partial.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()], ids=repr)
def test_an_early_end_keeps_its_rows_and_the_older_file(tmp_path, capsys, error):
    path, partial = tmp_path / "speed.csv", tmp_path / "speed.partial.csv"
    environment.write_csv(path, [{"value": "older"}])
    with pytest.raises(type(error)):
        environment.write_csv(path, rows_then("1", "2", error=error))
    assert [row["value"] for row in read_csv(path)] == ["older"]
    assert [row["value"] for row in read_csv(partial)] == ["1", "2"]
    assert f"2 rows in {partial}" in capsys.readouterr().err

    with pytest.raises(type(error)):  # before its first row
        environment.write_csv(path, rows_then(error=error))
    assert [row["value"] for row in read_csv(partial)] == ["1", "2"]

    environment.write_csv(path, [{"value": "newer"}])
    assert [row["value"] for row in read_csv(path)] == ["newer"]
    assert "in place of an older file" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        environment.write_csv(tmp_path / "file" / "speed.csv", rows_then(error=AssertionError()))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("cannot write speed.csv (")
    assert message.count("\n") == 1
    assert str(tmp_path / "file") in message


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("main", "status"),
    [
        (lambda: [{"error": ""}, {}], 0),
        (lambda: [{"error": ""}, {"error": "ValueError"}], 1),
        (lambda: environment.refuse("no"), 2),
        (lambda: signal.raise_signal(signal.SIGINT), 130),
    ],
    ids=["done", "failed", "refused", "interrupted"],
)
def test_exit_status(main, status):
    with pytest.raises(SystemExit) as ended:
        environment.run(main)
    assert ended.value.code == status


# Where numbers come from


def test_clocks_are_those_of_the_gpu_in_use(monkeypatch):
    commands = []

    def output(*command):
        commands.append(command)
        return "1980, [N/A]"

    monkeypatch.setattr(environment, "on_gpu", lambda: True)
    monkeypatch.setattr(environment, "output", output)
    properties = types.SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert environment.clocks() == {"sm_clock_mhz": "1980", "memory_clock_mhz": ""}
    assert "--id=GPU-1-2-3" in commands[0]
    assert "--query-gpu=clocks.current.sm,clocks.current.memory" in commands[0]

    monkeypatch.setattr(environment, "output", lambda *command: "")  # no nvidia-smi
    assert environment.clocks() == {"sm_clock_mhz": "", "memory_clock_mhz": ""}


def test_a_provider_that_does_not_import_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "flag_gems.py").write_text("raise RuntimeError('no driver\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    names = {one.name for one in providers.available()}
    assert "flag_gems" not in names
    assert "aten" in names
    assert "without flag_gems: RuntimeError: no driver\n" in capsys.readouterr().out
