"""Seeded bugs, and whether the tests that guard against each of them catch it.

    python -m tests.mutations                  all (`make mutate`), and writes tests/mutations.md
    python -m tests.mutations cuda-tail-bits   this one, with what pytest says; the others stay as
                                               the table has them

tests/mutations.toml lists the bugs. Every bug is one replacement in one file, made in a copy of the
tree, and only its guard runs. The guards run without a bug first, those of a kind in one process: a
guard that fails anyway, or that runs no test, proves nothing. A bug is caught if a test fails or
takes the process down; one that hangs, that does not build or that makes a fixture fail is not,
since none of these says what is wrong.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tests.mutation_list import Guard, Mutation, read_mutations

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "mutations.md"
TIMEOUT = 600  # seconds; the slowest guard takes about a minute


@dataclasses.dataclass(frozen=True)
class Result:
    """The test that failed first, or else why the bug does not count as caught."""

    caught_by: str = ""
    why_not: str = ""
    output: str = ""


def extensions(root: Path, pattern: str = "_*.so") -> list[Path]:
    return list((root / "fused_act").glob(pattern))


def lacks(guard: Guard) -> str | None:
    """What is missing here to run the tests of `guard`."""
    if guard.gpu and not torch.cuda.is_available():
        return "a GPU"
    if guard.host and not extensions(ROOT, "_host_*.so"):
        return "a C++ compiler"
    return "nvcc" if guard.rebuilds and not extensions(ROOT, "_C*.so") else None


def copy_tree(target: Path) -> Path:
    """Copy what git tracks or does not ignore, and the built extensions, into `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = {ROOT / name for name in listed.split("\0") if name} | set(extensions(ROOT))
    for source in filter(Path.is_file, paths):
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
    return target


def run(
    tree: Path, *command: str, timeout: float = TIMEOUT, **environment: str
) -> subprocess.CompletedProcess:
    """Run Python in `tree`, with its package and none of its byte code from before."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=inherited | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_pytest(
    tree: Path, guards: Sequence[Guard], *arguments: str, timeout: float = TIMEOUT
) -> subprocess.CompletedProcess:
    """Run pytest as `guards` want it, all of them in Triton's interpreter or none."""
    (interpreted,) = {guard.interpreted for guard in guards}
    command = ["-m", "pytest", "--tb=short", "-p", "no:cacheprovider", *arguments]
    if not any(guard.host for guard in guards):  # or C++ would do what a bug in Python spoils
        command.append("--without-host-extension")
    if interpreted:
        return run(tree, *command, "-m", "not gpu", timeout=timeout, TRITON_INTERPRET="1")
    return run(tree, *command, timeout=timeout)


def run_guards(
    tree: Path, guards: Sequence[Guard], *options: str
) -> tuple[subprocess.CompletedProcess, dict[Guard, dict[str, str | None]]]:
    """Run the tests of guards in one process, all of them in Triton's interpreter or none.

    Returns also what tests/guards.py reports of each guard: nothing if pytest stops before that.
    """
    places = [place for guard in guards for place in guard.arguments().places]
    files = sorted({place.partition("::")[0] for place in places})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = run_pytest(
            tree,
            guards,
            *("-p", "tests.guards", f"--guard-report={report}", "--continue-on-collection-errors"),
            *(f"--guard={guard.tests}" for guard in guards),
            *options,
            *(file for file in files if (tree / file).exists()),
            timeout=max(TIMEOUT, 60 * len(guards)),
        )
        ends = json.loads(report.read_text()) if report.exists() else {}
    return done, ends and {guard: ends[guard.tests] for guard in guards}


def check_guards(tree: Path, guards: Sequence[Guard]) -> dict[Guard, Result]:
    """Whether each guard passes without a bug, and runs a test where it can."""
    try:
        done, ends = run_guards(tree, guards, "-q")
    except subprocess.TimeoutExpired:
        why_not, output, ends = "hangs without a bug", "", {}
    else:
        why_not, output = f"pytest exits with {done.returncode} without a bug", done.stdout
    if ends:
        return {
            guard: Result(why_not=unfit(guard, list(tests.values())), output=output)
            for guard, tests in ends.items()
        }
    if len(guards) == 1:
        return {guards[0]: Result(why_not=why_not, output=output)}
    # Each by itself, to find the one that takes the process down.
    return {guard: check_guards(tree, [guard])[guard] for guard in guards}


def unfit(guard: Guard, ends: list[str | None]) -> str:
    """Why tests of `guard` that end like this without a bug prove nothing; empty if they do."""
    if not ends:
        return "selects no test"
    if not set(ends) <= {"passed", "skipped"}:
        return "fails without a bug"
    return "skips all its tests" if "passed" not in ends and lacks(guard) is None else ""


def try_mutation(tree: Path, mutation: Mutation) -> Result:
    """Seed the bug in `tree`, run its guards, take it out again."""
    path = tree / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        if mutation.guard.rebuilds or mutation.guard.host:
            other = "FUSED_ACT_BUILD_HOST" if mutation.guard.rebuilds else "FUSED_ACT_BUILD_CUDA"
            build = run(tree, "setup.py", "-q", "build_ext", "-f", "--inplace", **{other: "0"})
            if build.returncode != 0:
                return Result(why_not="does not build", output=build.stdout)
        tests = shlex.split(mutation.guard.tests)
        done = run_pytest(tree, [mutation.guard], "-v", "-x", *tests)
    except subprocess.TimeoutExpired:
        return Result(why_not="hangs")
    finally:
        path.write_text(original)
        if mutation.guard.rebuilds or mutation.guard.host:
            for extension in extensions(ROOT):
                shutil.copy2(extension, tree / extension.relative_to(ROOT))
    return judge(done)


def judge(done: subprocess.CompletedProcess) -> Result:
    if failed := re.search(r"^(tests/.*?) FAILED", done.stdout, re.MULTILINE):
        return Result(caught_by=failed[1], output=done.stdout)
    if done.returncode < 0:  # a signal: the test that was running is the last one named
        running = re.findall(r"^(tests/\S+::.*?)(?: PASSED| SKIPPED| Fatal|$)", done.stdout, re.M)
        return Result(caught_by=f"{running[-1].strip()} (crash)", output=done.stdout)
    why_not = "survives" if done.returncode == 0 else f"pytest exits with {done.returncode}"
    return Result(why_not=why_not, output=done.stdout)


def on_every_tree(trees: queue.Queue, work: Callable, items: Iterable, what: str) -> dict:
    """`work(tree, item)` for each item, as many at a time as there are trees."""
    # Not at the top: `make gpu` collects the tests with what the machine has.
    from tqdm import tqdm

    def with_tree(item):
        tree = trees.get()
        try:
            return item, work(tree, item)
        finally:
            trees.put(tree)

    items = list(items)
    with concurrent.futures.ThreadPoolExecutor(trees.qsize()) as pool:
        futures = [pool.submit(with_tree, item) for item in items]
        done = concurrent.futures.as_completed(futures)
        progress = tqdm(done, what, len(items), leave=False, smoothing=0)
        try:
            return dict(future.result() for future in progress)
        except BaseException:  # Ctrl-C must not wait for those that have not begun
            pool.shutdown(cancel_futures=True)
            raise


def written() -> dict[str, list[str]]:
    """The rows of the committed table, by name."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    return {row[0]: row for row in rows}


def table(names: Iterable[str], results: dict[Mutation, Result], rows: dict[str, list[str]]) -> str:
    """The table of `names`, with `results`; what these leave out is as in `rows`."""
    from tabulate import tabulate

    for mutation, result in results.items():
        verdict = f"`{result.caught_by}`" if result.caught_by else f"**{result.why_not}**"
        rows[mutation.name] = [mutation.name, f"`{mutation.file}`", mutation.bug, verdict]
    return tabulate(
        [rows[name] for name in names if name in rows],
        ("name", "file", "bug", "caught first by"),
        "github",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help="bugs to seed; none means all")
    parser.add_argument("-j", type=int, default=2, help="how many at a time (%(default)s)")
    arguments = parser.parse_args()
    try:
        mutations = read_mutations()
    except ValueError as error:
        sys.exit(str(error))
    names = [mutation.name for mutation in mutations]
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [m for m in mutations if not arguments.names or m.name in arguments.names]
    for mutation in chosen:
        if (count := (ROOT / mutation.file).read_text().count(mutation.old)) != 1:
            sys.exit(
                f"{mutation.name}: `old` must occur once in {mutation.file}, not {count} times"
            )
    with tempfile.TemporaryDirectory() as folder:
        trees = queue.Queue()
        for worker in range(arguments.j):
            trees.put(copy_tree(Path(folder) / str(worker)))
        runnable = [mutation for mutation in chosen if lacks(mutation.guard) is None]
        guards = dict.fromkeys(mutation.guard for mutation in runnable)
        kinds = collections.defaultdict(tuple)
        for guard in guards:
            kinds[guard.interpreted, guard.rebuilds, guard.host] += (guard,)
        results = on_every_tree(trees, check_guards, kinds.values(), "kinds of guards")
        checked = collections.ChainMap(*results.values())
        if failed := [guard for guard in guards if checked[guard].why_not]:
            print(*dict.fromkeys(checked[guard].output for guard in failed), sep="\n")
            print(*(f"{guard.tests}: {checked[guard].why_not}" for guard in failed), sep="\n")
            return 1
        results = on_every_tree(trees, try_mutation, runnable, "bugs")
    for mutation in chosen:
        if mutation not in results:
            results[mutation] = Result(why_not=f"needs {lacks(mutation.guard)}")
    if arguments.names:
        print(*(results[mutation].output for mutation in chosen), sep="\n")
    print(table(names, results, {}))
    TABLE.write_text(HEADER + table(names, results, written()) + "\n")
    survivors = [mutation.name for mutation in runnable if not results[mutation].caught_by]
    caught = f"{len(runnable) - len(survivors)} of {len(runnable)} seeded bugs caught"
    lacking = collections.Counter(lacks(mutation.guard) for mutation in chosen)
    caught += "".join(f", {count} more need {what}" for what, count in lacking.items() if what)
    if survivors:
        caught += f"; not caught: {', '.join(survivors)}"
    print(f"make mutate: {caught}")
    return bool(survivors)


HEADER = """# Seeded bugs and the tests that catch them

Written by `make mutate`, which seeds each bug in a copy of the sources and runs the tests that
guard against it. `tests/mutations.toml` has the replacements, and `tests/mutations.py` says what
counts as caught.

"""

if __name__ == "__main__":
    sys.exit(main())
