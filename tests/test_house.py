"""The house: where code stands, what may import what, how long a file and a statement may be."""

import ast
import re
import subprocess

import pytest
from helpers import ROOT

LISTED = subprocess.run(
    ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "*.py"],
    capture_output=True,
    text=True,
).stdout.split()
FILES = sorted(name for name in LISTED if (ROOT / name).exists())
CODE = [name for name in FILES if not name.startswith(("tests/", "config/"))]
TREES = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in FILES}

FOLDERS = ("corpus", "fast", "inference", "runtime", "evals", "bench", "exchange", "docs")
TOP = {
    *("README.md", "LICENSE", "pyproject.toml", "requirements.txt", "requirements-peers.txt"),
    *("CITATION.cff", "CONTRIBUTING.md", ".github"),
    *("train.py", "align.py", "model.py", "data.py", "eval.py", "configurator.py"),
    *(
        "sample.py",
        "convert.py",
        "speedrun.py",
        ".gitignore",
        ".ci",
        "config",
        "slurm",
        "tests",
        "docs",
        *FOLDERS,
    ),
}
BUDGETS = {"model.py": 380, "train.py": 380, "align.py": 665, "data.py": 300, "eval.py": 200}
BUDGETS |= {"configurator.py": 212}
LARGEST, ALL = 330, 13300

# Who may import whom; a folder may import itself, everyone but fast may import configurator
ARROWS = {
    "configurator": [],
    "fast": [],
    "model": ["fast"],
    "runtime": [],
    "runtime.checkpoint": ["model", "runtime.files"],
    "corpus": ["runtime.files"],
    "data": ["corpus", "runtime.files", "runtime.program"],
    "inference": ["corpus.chat", "corpus.tokenizer", "model"],
    "train": ["model", "fast.muon", "corpus", "runtime"],
    "align": ["train", "corpus", "inference", "model", "runtime"],
    "sample": ["inference", "corpus", "model", "runtime"],
    "evals": ["inference", "corpus", "model", "runtime"],
    "evals.baselines": ["corpus", "exchange.importing", "runtime.files"],
    "evals.report": [
        "evals.results",
        "evals.stats",
        "evals.tables",
        "evals.plots",
        "evals.html",
        "runtime.files",
        "runtime.logs",
        "runtime.program",
    ],
    "evals.tables": ["evals.results", "evals.stats", "runtime.files"],
    "evals.plots": ["evals.results", "evals.stats", "runtime.files"],
    "evals.results": ["evals.stats", "runtime.files", "runtime.locks", "runtime.logs"],
    "evals.stats": [],
    "evals.html": [],
    "eval": ["corpus.sources", "evals", "runtime"],
    "bench": ["model", "train", "corpus", "inference", "runtime"],
    "bench.tuning": ["align", "bench", "corpus", "inference", "model", "runtime", "train"],
    "bench.usage": ["bench", "corpus", "evals", "inference", "model", "runtime"],
    "exchange": ["corpus", "model", "runtime.checkpoint", "runtime.files", "runtime.logs"],
    "convert": ["exchange", "runtime.program"],
    "speedrun": ["runtime"],
    "docs": ["corpus", "evals.plots", "evals.results", "model", "runtime"],
}
OPTIONAL = {
    "transformers",
    "gguf",
    "pyarrow",
    "pyarrow.parquet",
    "rouge_score.rouge_scorer",
    "datasets",
    "trl",
    "lm_eval",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "llama_cpp",
}


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name) for name in CODE}


def imports_of(tree: ast.AST) -> list[str]:
    """Names of the modules that a file imports, of ours those that are meant."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in names]
    return found


def is_allowed(name: str, target: str) -> bool:
    """Say whether the module `name` may import the module `target`."""
    home = name.partition(".")[0]
    if target == "configurator":
        return home != "fast"
    if name not in ARROWS and target.partition(".")[0] == home:
        return True
    allowed = ARROWS.get(name, ARROWS[home])
    return any(target == other or target.startswith(f"{other}.") for other in allowed)


@pytest.mark.parametrize("name", CODE)
def test_every_import_follows_an_arrow(name):
    """Data flows one way; a circle, or a report that needs a model, begins with one import."""
    targets = {target for target in imports_of(TREES[name]) if target in MODULES}
    wrong = sorted(target for target in targets if not is_allowed(module_of(name), target))
    assert not wrong


def test_there_is_no_circle_of_imports():
    """Inside a folder any file may import any other, but not in a circle."""
    graph = {module_of(name): set(imports_of(TREES[name])) & MODULES for name in CODE}
    left = dict(graph)
    while ready := [name for name, targets in left.items() if not (targets - {name}) & set(left)]:
        for name in ready:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", CODE)
def test_imports_stand_at_the_top_but_for_optional_packages(name):
    """What a file needs is said where a reader looks for it."""
    inside = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            inside += imports_of(node)
    own = (
        {"nanochat.gpt", "nanochat.engine", "nanochat.tokenizer"}
        if name.startswith("bench/")
        else set()
    )
    if name == "bench/worker.py":  # another checkout of this project, by its own names
        own |= {"model", "train", "optim", "inference.sampling", "sample", "ranks", "runtime.world"}
    assert set(inside) <= OPTIONAL | own


def test_the_first_level_holds_what_the_readme_names():
    """A stranger must see at once which files matter."""
    listing = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"]
    paths = subprocess.run(listing, capture_output=True, text=True).stdout.split("\n")
    there = {path.partition("/")[0] for path in paths if path and (ROOT / path).exists()}
    assert there <= TOP, there - TOP


def test_the_readme_names_every_file_and_no_other():
    """The tree in the README is the map; a file that it lacks is not found, another is a lie."""
    text = (ROOT / "README.md").read_text().partition("## The files")[2].partition("\n## ")[0]
    named = set(re.findall(r"[a-z_]+\.py", text))
    own = {name.rpartition("/")[2] for name in CODE if not name.startswith("bench/")}
    assert named - {"test_house.py"} == own - {"__init__.py"}


@pytest.mark.parametrize("name", CODE)
def test_every_file_keeps_its_budget(name):
    """A file that outgrows one sitting is read by nobody."""
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= BUDGETS.get(name, LARGEST)


def test_all_files_together_keep_the_budget():
    """Recipes apart, which are settings: what a reader has to read."""
    assert sum(len((ROOT / name).read_text().splitlines()) for name in CODE) <= ALL


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is(name):
    """The first sentence of a file is where its reader decides to go on."""
    assert ast.get_docstring(TREES[name])


def n_nodes(statement: ast.stmt) -> int:
    """Number of syntax nodes of a statement, without the statements inside it."""
    count, stack = 0, [statement]
    while stack:
        node, count = stack.pop(), count + 1
        inner = ast.iter_child_nodes(node)
        stack += [child for child in inner if not isinstance(child, ast.stmt | ast.expr_context)]
    return count


def comprehension_depth(node: ast.AST) -> int:
    """Comprehensions inside one another."""
    kinds = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    inner = max(map(comprehension_depth, ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, kinds)


def statements(tree: ast.Module) -> list[ast.stmt]:
    """All statements but the tables of constants at the top level of a file."""
    tables = {node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)}
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node not in tables]


@pytest.mark.parametrize("name", CODE)
def test_no_statement_says_too_much(name):
    """At most 40 nodes: nanoGPT, nanochat and DPO have 0 to 0.5 % of longer ones."""
    long = [(s.lineno, n_nodes(s)) for s in statements(TREES[name]) if n_nodes(s) > 40]
    assert not long


@pytest.mark.parametrize("name", CODE)
def test_at_most_one_comprehension_stands_inside_another(name):
    """A third level is a loop that somebody folded."""
    leaves = [s for s in statements(TREES[name]) if not hasattr(s, "body")]
    assert not [s.lineno for s in leaves if comprehension_depth(s) > 2]


def test_the_loop_is_flat_and_short():
    """The one function that every user reads: under 60 lines, and one loop in it."""
    (loop,) = (n for n in TREES["train.py"].body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.lineno + 1 < 60
    assert sum(isinstance(node, ast.For) for node in loop.body[-1].body) == 1
