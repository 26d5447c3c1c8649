"""Who may import whom, read from the sources, and what is loaded when a run starts."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "mpt_jax").rglob("*.py"))

# The longest matching name decides. A module may import its own level and the levels below.
LEVELS = {
    0: "__init__ errors shapes config gin_text trees files progress quiet hardware distributed signals",
    1: "models prompts losses decoding metrics costs collectives guard",
    2: "prompts.arrays prompts.peft prompts.files prompts.init prompted_t5 distill optim partitioning data",
    3: "train_state checkpoint",
    4: "setup board claims monitor predict ensemble train evaluate infer export convert browse memory plan bench",
    5: "stages study_checks study_data jobs transfer pipeline sweep sweep_cost studies",
    6: "resolve gin_bindings usage cli __main__",
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}
PURE = {"gin", "seqio", "orbax", "tensorflow", "tensorflow_datasets", "tensorflow_text", "safetensors", "pathlib", "os"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT / "mpt_jax").with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


def level(module: str) -> int:
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = next((name for name in names if name in LEVEL_OF), None)
    assert found is not None, f"mpt_jax.{module} is in no layer; add it to LEVELS"
    return LEVEL_OF[found]


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute names of everything that a file imports, at its top or within functions, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            # `from mpt_jax.prompts import files` imports a module, `… import build_prompt` a name.
            for alias in node.names:
                inner = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.append((f"{node.module}.{alias.name}" if is_module else str(node.module), node.lineno))
    return found


def test_layers_import_downwards():
    wrong = []
    for path in SOURCES:
        for name, line in imports(path):
            if name.split(".")[0] != "mpt_jax":
                continue
            other = name.removeprefix("mpt_jax").removeprefix(".") or "__init__"
            if level(other) > level(module_of(path)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} from a higher layer")
    assert not wrong, "\n".join(wrong)


def importers(package: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in SOURCES for name, _ in imports(path) if name.split(".")[0] == package}


def test_one_file_imports_gin():
    assert importers("gin") == {"mpt_jax/gin_bindings.py"}
    assert not list((ROOT / "gin").rglob("*.py")), "a Python file in gin/ would shadow gin-config"


def test_tasks_are_never_imported_by_name():
    assert importers("tasks") == set()


def test_only_cache_building_imports_seqio_and_tensorflow():
    allowed = {"mpt_jax/data/build.py", "mpt_jax/data/registry.py", "mpt_jax/data/rows.py", "mpt_jax/data/vocabulary.py"}
    for package in ("seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text"):
        assert importers(package) <= allowed, package


def test_tests_only_libraries_stay_in_tests():
    assert importers("transformers") | importers("peft") == set()
    assert importers("torch") <= {"mpt_jax/checkpoint/hf_format.py", "mpt_jax/checkpoint/hf_files.py"}


def test_pure_layer_touches_no_files():
    wrong = []
    for path in SOURCES:
        if level(module_of(path)) == 1:
            wrong += [
                f"{path.relative_to(ROOT)}:{line} imports {name}" for name, line in imports(path) if name.split(".")[0] in PURE
            ]
    assert not wrong, "\n".join(wrong)


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_everything_that_runs_starts_without_tensorflow():
    modules = [f"mpt_jax.{module_of(path)}" for path in SOURCES if not path.name.startswith("__")]
    loaded = loaded_after("import " + ", ".join(modules))
    assert not loaded & {"seqio", "tensorflow", "tensorflow_datasets", "tasks", "torch", "transformers", "peft"}


def test_show_and_help_load_nothing_heavy():
    assert not loaded_after("import mpt_jax.cli") & {"jax", "numpy", "flax", "orbax", "matplotlib", "tensorflow"}
