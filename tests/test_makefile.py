"""`make gpu` and its stages: their order, what a second run does, what failures and Ctrl-C do.

PYTHON is a script that notes its arguments and writes the files that the commands would write.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if shutil.which("make") is None:
    pytest.skip("needs make", allow_module_level=True)

# FAILS and WITHOUT_FILE are lists of words: commands of `python -m benchmarks`, "pytest", "build".
# STATUS is that of what fails. WAITS waits until it is interrupted, and then has pytest's status.
# XDIST says whether pytest-xdist is there.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  "-c import xdist") exit $XDIST ;;
  -c*is_available*) [ "$FAILS" = gpu ] && { echo "torch sees no CUDA GPU" >&2; exit 1; }; exit 0 ;;
esac
echo "$* ${OMP_NUM_THREADS:+with $OMP_NUM_THREADS thread}" >>calls.txt
case "$1 $2" in
  setup.py*) name=build ;;
  "-m pytest") name=pytest; file=${@: -1}; file=${file#--outcomes=} ;;
  "-m tests.sanitize") name=sanitize; echo "sanitize: 3 tensors" ;;
  *) name=$3
     case "$*" in *--compiled*) suffix=_compiled ;; *--edges*) suffix=_edges ;; esac
     case $name in plot | compare) ;; *) file=results/$name$suffix.csv ;; esac ;;
esac
if [ "$WAITS" = $name ]; then trap 'exit 2' INT; touch waiting; sleep 60; fi
failed=0
[[ " $FAILS " == *" $name "* ]] && failed=1
if [ -n "$file" ] && [[ " $WITHOUT_FILE " != *" $name "* ]]; then
  mkdir -p results; echo "commit" >"$file"
fi
[ $failed = 0 ] || exit ${STATUS:-1}
"""
STAGES = ("build", "pytest", "speed", "networks", "memory", "accuracy", "plot", "compare")
FILES = ("tests.csv", "speed.csv", "networks.csv", "memory.csv", "accuracy.csv")


class Made:
    """What a run of make printed, its status, and the calls of PYTHON since the run before."""

    def __init__(self, status: int, output: str, calls: list[str]):
        self.status, self.output, self.calls = status, output, calls
        self.lines = output.splitlines()
        self.last = self.lines[-1] if self.lines else ""

    @property
    def names(self) -> tuple[str, ...]:
        """The stages that ran, by the words of PYTHON above."""
        words = [call.split() for call in self.calls]
        return tuple(
            "build" if each[0] == "setup.py" else each[2] if each[1] == "benchmarks" else each[1]
            for each in words
        )


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder of its own, with the stand-in for Python."""
    script = tmp_path / "python"
    script.write_text(PYTHON)
    script.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make(*arguments, xdist=True, **variables):
        (tmp_path / "calls.txt").write_text("")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "OMP_"))}
        process = subprocess.Popen(
            ["make", f"PYTHON={script}", "RESULTS=results", *arguments],
            cwd=tmp_path,
            env=inherited | {"XDIST": str(int(not xdist))} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if "WAITS" in variables:
            while not (tmp_path / "waiting").exists():
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        printed, _ = process.communicate()
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        return Made(process.returncode, printed, calls)

    return make


def test_stages_in_their_order(make):
    made = make("gpu")
    assert made.status == 0, made.output
    assert made.names == STAGES
    assert made.last == "make gpu: passed; results and pictures are in results"
    assert "-m benchmarks compare results results " in made.calls
    assert "-m benchmarks speed --results results --time-limit 120 " in made.calls


def test_a_baseline_is_compared_with(make):
    assert "-m benchmarks compare older results " in make("gpu", "BASELINE=older").calls


def test_the_tests_take_as_many_processes_as_there_are_cores(make):
    made = make("gpu-test")
    (call,) = [call for call in made.calls if "pytest" in call]
    assert "-m (gpu or with_gpu) and not overlapping -n auto" in call
    assert "--dist loadscope --outcomes=results/tests.csv with 1 thread" in call
    assert "gpu-test: one process for each core" in made.lines


def test_without_xdist_the_tests_take_one_process_and_say_so(make):
    made = make("gpu-test", xdist=False)
    (call,) = [call for call in made.calls if "pytest" in call]
    assert " -n " not in call
    assert call.endswith("--outcomes=results/tests.csv ")
    assert "gpu-test: pytest-xdist is not installed: one process" in made.lines


def test_what_is_complete_is_not_run_again(make):
    make("gpu")
    made = make("gpu")
    assert made.status == 0
    assert made.names == ("build", "plot", "compare")
    for stage, file in zip(("test", "speed", "networks", "memory", "accuracy"), FILES):
        line = f"gpu-{stage}: results/{file} is there already"
        assert [each for each in made.lines if each.startswith(line)]


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("failed", 2), ("error", 2)])
def test_tests_that_failed_before_fail_again(make, tmp_path, outcome, status):
    make("gpu-test")
    (tmp_path / "results" / "tests.csv").write_text(
        f"test,outcome,seconds,error,commit\na.py::test,{outcome},0.1,,abc\n"
    )
    made = make("gpu-test")
    assert made.status == status
    assert ("gpu-test: FAILED, as that file says" in made.lines) == (status != 0)


def test_a_file_of_another_commit_is_said_to_be_one(make, tmp_path):
    make("gpu-speed")
    said = "gpu-speed: results/speed.csv is there already{}; remove it to run gpu-speed again"
    assert make("gpu-speed").last == said.format("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], cwd=tmp_path, check=True)
    assert make("gpu-speed").last == said.format(", of another commit")


@pytest.mark.parametrize("stage", ["pytest", "networks"])
def test_ctrl_c_ends_all(make, ctrl_c, stage):
    """Whatever status a command has then: pytest has another one than the benchmarks."""
    made = make("gpu", WAITS=stage, WITHOUT_FILE=stage)
    assert made.status != 0
    assert made.names == STAGES[: STAGES.index(stage) + 1]
    assert "make gpu: " not in made.output


def test_what_was_interrupted_is_taken_up_again(make):
    """The next run begins with the stage that was not finished."""
    made = make("gpu", FAILS="networks", WITHOUT_FILE="networks", STATUS="130")
    assert made.status != 0
    assert made.names == STAGES[:4]
    assert "make gpu: " not in made.output
    made = make("gpu")
    assert made.status == 0
    assert made.names == ("build", *STAGES[3:])


def test_tests_that_take_too_long_are_cut_off_and_taken_up_again(make):
    made = make("gpu", FAILS="pytest", WITHOUT_FILE="pytest", STATUS="124")
    assert made.status != 0
    assert made.names == STAGES
    said = "gpu-test: cut off, since its time is over; make gpu-test goes on where it ended"
    assert said in made.lines
    assert "make gpu: FAILED, see above; results are in results" in made.lines
    assert make("gpu").names == ("build", "pytest", "plot", "compare")


@pytest.mark.parametrize("failing", STAGES)
def test_a_stage_that_fails_keeps_no_other_from_running(make, failing):
    made = make("gpu", FAILS=failing)
    assert made.status != 0
    assert made.names == STAGES
    assert "make gpu: FAILED, see above; results are in results" in made.lines
    stage = {"pytest": "gpu-test", "plot": "gpu-pictures", "compare": "gpu"}
    assert f"{stage.get(failing, f'gpu-{failing}')}: FAILED, see above" in made.lines


def test_the_verdict_fails_a_second_run_too(make):
    make("gpu", FAILS="compare")
    made = make("gpu", FAILS="compare")
    assert made.status != 0
    assert made.names == ("build", "plot", "compare")
    assert "make gpu: FAILED, see above; results are in results" in made.lines


@pytest.mark.parametrize("target", ["gpu", "gpu-test", "gpu-edges", "sanitize"])
def test_without_a_gpu_nothing_runs(make, target):
    made = make(target, FAILS="gpu")
    assert made.status != 0
    assert "torch sees no CUDA GPU" in made.lines
    assert made.calls == []


@pytest.mark.parametrize(
    ("target", "command", "file"),
    [
        ("gpu-edges", "-m benchmarks speed --edges --results results ", "speed_edges.csv"),
        (
            "gpu-compiled",
            "-m benchmarks networks --compiled --results results ",
            "networks_compiled.csv",
        ),
        ("gpu-overhead", "-m benchmarks overhead --results results ", "overhead.csv"),
    ],
)
def test_targets_of_their_own(make, tmp_path, target, command, file):
    made = make(target)
    assert made.status == 0
    assert made.calls == ["setup.py -q build_ext --inplace ", command]
    assert (tmp_path / "results" / file).exists()
    assert "is there already" in make(target).last
    assert make(target, FAILS="build").status != 0


def test_all_tests_of_a_gpu_have_no_limit_and_a_file_of_their_own(make):
    made = make("gpu-test-all")
    (call,) = [call for call in made.calls if "pytest" in call]
    assert "-m gpu or with_gpu -n auto" in call
    assert "--outcomes=results/tests_all.csv" in call
    assert [line for line in made.lines if "timeout --foreground -s INT -k 20 0 " in line]


SANITIZER = r"""#!/usr/bin/env bash
[ "$1" = --version ] && exit 0
echo "$*" >>sanitized.txt
while [ "${1##*/}" != python ]; do shift; done
"$@" || exit
[[ " $* " != *" $FINDS "* ]] || { echo "========= ERROR SUMMARY: 1 error"; exit 1; }
[[ " $* " == *" $IS_SILENT "* ]] || echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    (tmp_path / "compute-sanitizer").write_text(SANITIZER)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "sanitized.txt"


def test_each_sanitizer_sees_each_backend_and_dtype(make, sanitizer):
    made = make("sanitize")
    assert made.status == 0, made.output
    assert made.last == "make sanitize: memcheck, racecheck and initcheck found nothing"
    calls = [line.split() for line in sanitizer.read_text().splitlines()]
    for tool, part in (
        ("memcheck", "--report-api-errors no"),
        ("racecheck", "--sharing"),
        ("initcheck", "--sizes 9 4105 --offsets 1"),
    ):
        found = [" ".join(each) for each in calls if each[1] == tool]
        assert len(found) == 6
        assert all(part in each and "--error-exitcode 1" in each for each in found)
        assert {
            (backend, dtype)
            for each in found
            for backend in ("triton", "cuda")
            for dtype in ("float16", "bfloat16", "float32")
            if f"--backends {backend} --dtypes {dtype}" in each
        } == {(b, d) for b in ("triton", "cuda") for d in ("float16", "bfloat16", "float32")}
    assert len(calls) == 18
    assert "memcheck-cuda-float16: sanitize: 3 tensors" in made.lines


def test_what_one_sanitizer_finds_is_shown_and_fails(make, sanitizer):
    made = make("sanitize", FINDS="--sharing")
    assert made.status != 0
    assert "========= ERROR SUMMARY: 1 error" in made.lines
    assert "racecheck-triton-float16: FAILED, see build/sanitize/racecheck-triton-float16.log" in (
        made.lines
    )
    assert "memcheck-triton-float16: sanitize: 3 tensors" in made.lines
    assert "make sanitize: FAILED, see above and build/sanitize" in made.lines


def test_a_sanitizer_that_did_not_watch_fails(make, sanitizer):
    """Whatever its status is: a GPU that it does not know, or a child that it does not follow."""
    made = make("sanitize", IS_SILENT="--sharing")
    assert made.status != 0
    assert [line for line in made.lines if line.startswith("racecheck-cuda-float16: FAILED")]
    assert "memcheck-cuda-float16: sanitize: 3 tensors" in made.lines


def test_without_compute_sanitizer_it_says_so(make, tmp_path):
    if shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is here")
    made = make("sanitize")
    assert made.status != 0
    assert "needs compute-sanitizer, of the CUDA toolkit" in made.lines
