"""`python -m benchmarks`: its commands, the options that they share, and missing packages."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import environment
from benchmarks.__main__ import COMMANDS, parse
from tests.shared.benchmarks import status

WITHOUT_EXTRA = (
    *("speed", "networks", "memory", "accuracy", "compile", "overhead", "instructions"),
    "compare",
)
FOLDERS = {"compare": ("old", "new")}  # what a command cannot be parsed without

# Which command takes which of the shared options.
TAKE = {
    "--results": tuple(name for name in COMMANDS if name not in FOLDERS),
    "--activations": ("speed", "memory", "accuracy", "training"),
    "--dtypes": ("speed", "memory", "accuracy", "compile"),
    "--sizes": ("speed", "compile"),
    "--rounds": ("networks", "compile", "overhead"),
    "--epochs": ("training", "demo"),
    "--seeds": ("training", "demo"),
}
TAKEN = [(option, name) for option, names in TAKE.items() for name in names]


@pytest.fixture
def extra():
    """The packages without which not every command can be asked for its options."""
    for package in ("matplotlib", "sklearn", "tabulate", "tqdm"):
        pytest.importorskip(package, reason="needs the extra 'bench'")


def refusal(capsys, *arguments) -> str:
    """What a command says of its arguments before it ends."""
    assert status(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]


def test_alone_it_lists_the_commands_one_line_each(capsys):
    assert status() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [
            f"    {name:13} {summary}"
        ]


def test_a_command_that_is_none_is_refused(capsys):
    assert refusal(capsys, "sped").startswith("argument COMMAND: invalid choice: 'sped'")


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize("name", COMMANDS)
def test_help(capsys, name):
    assert status(name, "--help") == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: python -m benchmarks {name} ")
    assert command.load(name).__doc__ in output
    assert f"    python -m benchmarks {name}" in output
    options = {word.strip("[],") for word in output.split() if word.startswith(("--", "[--"))}
    assert options & TAKE.keys() == {option for option, names in TAKE.items() if name in names}


def test_the_page_has_every_command():
    page = (environment.ROOT / "README.md").read_text()
    commands = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert commands[1:] == list(COMMANDS)


VALUES = {
    "--results": (["folder"], Path("folder")),
    "--dtypes": (["fp16", "fp32"], ["fp16", "fp32"]),
    "--sizes": (["2^20", "1000"], [2**20, 1000]),
    "--rounds": (["3"], 3),
    "--epochs": (["3"], 3),
    "--seeds": (["3"], 3),
}


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize(("option", "name"), TAKEN)
def test_a_shared_option_is_read_alike(option, name):
    if option == "--activations":
        found = parse([name, option, "mish", "leaky_relu"]).activations
        assert [getattr(each, "op", each.name) for each in found] == ["mish", "leaky_relu"]
    else:
        values, expected = VALUES[option]
        assert vars(parse([name, option, *values]))[option.removeprefix("--")] == expected


REFUSED = {
    "--activations": ("Gelu", "expected one of "),
    "--dtypes": ("fp64", "invalid choice: 'fp64' (choose from "),
    **dict.fromkeys(("--rounds", "--epochs", "--seeds"), ("0", "expected a positive whole number")),
}


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize("option", REFUSED)
def test_a_shared_option_is_refused_alike(capsys, option):
    text, reason = REFUSED[option]
    messages = {name: refusal(capsys, name, option, text) for name in TAKE[option]}
    for message in messages.values():
        assert message.startswith(f"argument {option}: {reason}")
        assert f"'{text}'" in message
    if option != "--activations":  # of which training takes more
        assert len(set(messages.values())) == 1


@pytest.mark.parametrize("name", TAKE["--sizes"])
@pytest.mark.parametrize("text", ["x", "2^", "0", "-1", "2^60", "1e6", "2^2^2", "9^999999999"])
def test_a_size_that_is_none_is_refused(capsys, name, text):
    message = refusal(capsys, name, f"--sizes={text}")
    assert message == (f"argument --sizes: expected 2^8 to 2^40, or a number such, got {text!r}")


@pytest.mark.usefixtures("extra")
def test_a_count_that_is_none_is_refused(capsys):
    assert refusal(capsys, "training", "--seeds", "x").endswith("whole number, got 'x'")


@pytest.mark.usefixtures("extra")
def test_by_default_results_are_in_the_folder_of_the_device():
    names = TAKE["--results"]
    folders = {name: parse([name]).results.relative_to(environment.ROOT) for name in names}
    own = {"instructions": "machine_code", "demo": "demo"}
    for name, folder in folders.items():
        assert folder == Path("results", own.get(name, environment.device_folder()))


def python(code: str) -> subprocess.CompletedProcess:
    """A process in which no module has been imported yet."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=environment.ROOT.parent, capture_output=True, text=True)


def test_most_commands_need_no_package_of_the_extra():
    code = f"""
import sys
missing = ("matplotlib", "sklearn", "tabulate", "tqdm")
sys.modules |= dict.fromkeys(missing)
from benchmarks.__main__ import parse
for name in {WITHOUT_EXTRA}:
    parse([name, *{FOLDERS}.get(name, ())])
"""
    finished = python(code)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("matplotlib", ("plot", "activations", "training", "demo")),
        ("sklearn.datasets", ("training", "demo")),
    ],
)
def test_without_what_it_needs_a_command_is_refused(package, names):
    code = f"""
import sys
sys.modules["{package}"] = None
from benchmarks.__main__ import main
for name in {names}:
    try:
        main([name])
    except SystemExit as ended:
        print(name, ended.code)
"""
    finished = python(code)
    assert finished.stdout.splitlines() == [f"{name} 2" for name in names], finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines):
        assert line.startswith(f"{name} needs the extra 'bench', pip install '.[bench]': ")
        assert package in line


def test_a_mistake_of_ours_is_not_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.timing", None)
    monkeypatch.delitem(sys.modules, "benchmarks.overhead", raising=False)
    monkeypatch.delattr("benchmarks.timing", raising=False)
    with pytest.raises(ImportError, match="timing"):
        command.load("overhead")
