"""The house: what may name what, which way imports go, and where torch's private names stand.

CONTRIBUTING.md has the picture.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

import fused_act
from fused_act.activations import FAMILIES, ROWS
from tests.shared.facts import FACTS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fused_act"
PYTHON = sorted(PACKAGE.rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())

# What is there to name activations: their files, the math, the lists, and what users import.
NAMES_ACTIVATIONS = {
    *(PACKAGE / "activations").iterdir(),
    PACKAGE / "__init__.py",
    PACKAGE / "replace.py",
    PACKAGE / "backends" / "triton" / "activations.py",
    ROOT / "csrc" / "activations.cuh",
    ROOT / "csrc" / "register.cu",
}
# In the order of imports: a module imports from its own line, but for the lines that are apart, and
# from those above it. A package stands for what is in it.
LAYERS = [
    {"version", "_torch_private", "dispatch", "libraries", "extensions"},
    {"families.raw_op", "families.recording"},
    {"families.compiled"},
    {"families.base"},
    {"families.masks"},
    {"families"},
    {"activations"},
    {"ops", "host"},
    {"backends.cuda", "backends.triton", "backends.eager"},
    {"backends"},
    {"packing"},
    {"rematerialization", "replace"},
    {"__init__"},
    {"__main__"},
]
APART = (LAYERS[0], LAYERS[7], LAYERS[8], LAYERS[11])


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def code_of(path: Path) -> str:
    """The code, without comments and docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        return re.sub(r"//.*", "", text)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def module_of(path: Path) -> str:
    """The dotted name below fused_act: "families.base"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(path: Path) -> set[str]:
    """The modules of ours that `path` imports, by dotted name below fused_act."""
    modules = {module_of(each) for each in PYTHON}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fused_act":
                while rest not in modules and rest:
                    rest = rest.rpartition(".")[0]  # a name in a module
                found.add(rest or "__init__")
    return found


@each([path for path in (*PYTHON, *CSRC) if path not in NAMES_ACTIVATIONS])
def test_generic_code_names_no_activation(path):
    """But for examples, in comments and docstrings."""
    code = code_of(path)
    assert not re.findall(rf"(?<![a-z])(?:{'|'.join([*ROWS, 'silu'])})(?![a-z])", code)
    spellings = "|".join([*(row.spelling for row in ROWS.values()), "SiLU", "Silu"])
    assert not re.findall(rf"(?:{spellings})(?![a-z])", code)


@each([path for path in (*PYTHON, *CSRC) if path not in NAMES_ACTIVATIONS])
def test_code_of_no_family_names_no_family(path):
    """One family may build on another, as a mirrored activation is made of an elementwise one."""
    if re.split(r"[_.]", path.name)[0] not in FAMILIES:
        code = code_of(path).replace("tl.inline_asm_elementwise", "")
        assert not re.findall(rf"(?i){'|'.join(FAMILIES)}", code)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_same_name_in_every_layer(family):
    for path in (
        PACKAGE / "families" / f"{family}.py",
        PACKAGE / "backends" / "triton" / f"{family}.py",
        ROOT / "csrc" / f"{family}.cuh",
        ROOT / "csrc" / f"{family}_ops.cuh",
    ):
        assert path.exists()
    for row in FAMILIES[family]:
        assert row.family == family
        assert type(row).__module__ == f"fused_act.families.{family}"


def test_the_extension_registers_every_row():
    registered = re.findall(
        r'(\w+)::implement<(\w+)((?:, double)*)>\(library, "(\w+)"\)',
        (ROOT / "csrc" / "register.cu").read_text(),
    )
    assert sorted(registered) == sorted(
        (
            row.family,
            row.pair.spelling,
            ", double" * len(getattr(row, "parameters", ())),
            row.name,
        )
        for row in ROWS.values()
    )


def test_public_functions_are_spelled_as_their_rows():
    for row in ROWS.values():
        function = getattr(fused_act, f"{row.spelling}Function")
        assert function is row.Function
        assert (function.__module__, function.__qualname__) == (
            "fused_act",
            f"{row.spelling}Function",
        )


@each(PYTHON)
def test_imports_go_downwards(path):
    def place(module):
        """The number of the line, and what stands there for `module`."""
        name = module
        while True:
            for i, layer in enumerate(LAYERS):
                if name in layer:
                    return i, name
            assert name, f"{module} has no line"
            name = name.rpartition(".")[0]

    module = module_of(path)
    line, part = place(module)
    for name in imported(path):
        other_line, other = place(name)
        assert other_line <= line, f"{module} imports {name}"
        if LAYERS[line] in APART:
            assert other_line < line or other == part, f"{module} imports {name}"


def test_no_module_imports_itself_in_a_circle():
    """A package counts as what it imports, and not as what is in it."""
    graph = {module_of(path): set(imported(path)) - {module_of(path)} for path in PYTHON}
    while leaves := {module for module, found in graph.items() if not found & graph.keys()}:
        graph = {module: found for module, found in graph.items() if module not in leaves}
    assert not graph


def test_the_ground_imports_nothing_of_ours():
    for name in LAYERS[0]:
        assert not imported(PACKAGE / f"{name}.py")


@each(PYTHON)
def test_imports_stand_at_the_top(path):
    """But for Triton, which takes 90 ms, and may be missing or broken."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in tree.body:
            assert ast.unparse(node) == "import triton"


@each([path for path in PYTHON if path.name != "_torch_private.py"])
def test_private_names_of_torch_stand_in_one_file(path):
    allowed = {"_replace", "_asdict"}  # of a NamedTuple, which are public
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            assert not node.attr.startswith("_") or node.attr in allowed, node.attr
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            dotted = [
                *(getattr(node, "module", None) or "").split("."),
                *".".join(names).split("."),
            ]
            private = {name for name in dotted if re.match("_[a-zA-Z]", name)}
            assert private <= {"_torch_private"}
            assert "required" not in names
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in ("getattr", "hasattr", "setattr", "attrgetter"):
                strings = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                assert not [text for text in strings if re.search(r"(^|\.)_[a-zA-Z]", str(text))]


@each([*PYTHON, *CSRC])
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 330


def test_a_torch_that_lacks_a_name_says_which():
    from fused_act._torch_private import required

    with pytest.raises(
        ImportError, match=r"needs torch\._C\._NoSuchThing, which torch .* does not"
    ):
        required("_C._NoSuchThing")


# The tests.

TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """All modules that a file imports, by dotted name; names in modules count as modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@each(TESTS)
def test_no_test_imports_a_test(path):
    assert not [name for name in imports(path) if name.startswith("tests.test_")]


# The modules of tests/shared that benchmarks import.
OF_BENCHMARKS = ["facts", "ulp", "machine_code", "kernels", "compiling", "cpu_ops"]


@pytest.mark.parametrize("name", OF_BENCHMARKS)
def test_what_benchmarks_share_with_tests_needs_torch_alone(name):
    allowed = {"torch", "triton", "fused_act", "tests", *sys.stdlib_module_names}
    found = imports(ROOT / "tests" / "shared" / f"{name}.py")
    assert {each.partition(".")[0] for each in found} <= allowed
    shared = {each.split(".")[2] for each in found if each.startswith("tests.shared.")}
    assert shared <= set(OF_BENCHMARKS)


def test_tests_stand_by_topic():
    """A file of a family or of an activation would leave out the rows of the next one."""
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.stem.removeprefix("test_") not in {*FAMILIES, *ROWS}


@pytest.mark.parametrize("name", FACTS)
def test_only_the_row_of_facts_names_an_activation_in_a_table(name):
    """Keys that are names would be a second row of facts. A few tests are about three or fewer."""
    for path in [*TESTS, *(ROOT / "benchmarks").glob("*.py")]:
        if path.name not in ("facts.py", "measured.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Dict):
                    keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                    assert not (name in keys and len(keys & FACTS.keys()) > 3), path
