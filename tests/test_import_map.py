"""The map of the house: which package may import which, and which file owns each heavy library."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "model": {"infra"},
    "infra": set(),
    "data_pipeline": {"model", "infra"},
    "trainer": {"model", "infra", "data_pipeline"},
    "eval": {"model", "infra", "data_pipeline"},
}
MODEL_MAY_IMPORT = {"infra.errors", "infra.cli", "infra.codec"}  # a model needs no storage, no launcher and no Ray
OWNERS = {
    "deepspeed": ("trainer/zero/",),
    "s3fs": ("infra/s3.py",),
    "fsspec": ("infra/s3.py",),
    "webdataset": ("data_pipeline/packing/shards.py",),
    "ray": ("infra/runner.py", "infra/launch/"),
}
APEX_PACKAGES = {"model", "trainer"}


@functools.cache
def parse(path: Path) -> ast.Module:
    """Each file once: the tests below ask for the whole tree forty times."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Every dotted module name that `path` imports, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write the full name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_downwards(package):
    siblings = set(ALLOWED) - {package} - ALLOWED[package]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in sorted(imports(path))
        if name.split(".")[0] in siblings
    ]
    assert not wrong, "\n".join(wrong)


def test_model_imports_only_errors_and_command_lines_of_infra():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("model")
        for name in sorted(imports(path))
        if name.startswith("infra") and name.rpartition(".")[0] not in MODEL_MAY_IMPORT
    ]
    assert not wrong, "\n".join(wrong)


def test_one_file_knows_tyros_private_parts():
    found = [
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in sources(package)
        if any(name.startswith("tyro._") for name in imports(path))
    ]
    assert found == ["infra/cli.py"]


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_libraries_have_one_owner(library):
    wrong = [
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in sources(package)
        if any(name.split(".")[0] == library for name in imports(path))
        and not str(path.relative_to(ROOT)).startswith(OWNERS[library])
    ]
    assert not wrong, f"{library} belongs to {OWNERS[library]}, but is imported in {wrong}"


def test_apex_is_known_to_one_file_per_package():
    files = [
        path.relative_to(ROOT)
        for package in ALLOWED
        for path in sources(package)
        if any(name.split(".")[0] == "apex" for name in imports(path))
    ]
    packages = [file.parts[0] for file in files]
    assert set(packages) <= APEX_PACKAGES, files
    assert len(packages) == len(set(packages)), files


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_level_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_no_circle_of_imports():
    modules = {module_name(path): path for package in ALLOWED for path in sources(package)}
    edges = {name: module_level_imports(path) & (set(modules) - {name}) for name, path in modules.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(edges[name]):
            walk(target, (*trail, name))
        done.add(name)

    for name in sorted(edges):
        walk(name, ())


def room_of(path: Path) -> str:
    """A folder of a package is a room, with all that lies below it; a loose file is a room of its own."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2])


def test_no_circle_of_rooms():
    """No folder imports a folder that imports it back, by any way round. Command lines know all: left out."""
    modules = {module_name(path): path for package in ALLOWED for path in sources(package)}
    edges: dict[str, set[str]] = {}
    for path in modules.values():
        if path.name == "__main__.py":
            continue
        known = [modules[target] for target in module_level_imports(path) if target in modules]
        targets = {room_of(target) for target in known if target.name != "__init__.py"}
        edges.setdefault(room_of(path), set()).update(targets - {room_of(path)})
    done: set[str] = set()

    def walk(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, " -> ".join((*trail[trail.index(room) :], room))
        if room in done:
            return
        for target in sorted(edges.get(room, ())):
            walk(target, (*trail, room))
        done.add(room)

    for room in sorted(edges):
        walk(room, ())


# DeepSpeed's attributes that are no public interface of it; each must occur in trainer/zero/partition.py.
DEEPSPEED_PRIVATE = (
    "_get_norm_groups", "_hp_mapping", "_partitioned_params_swap_out",
    "_PartitionedParameterCoordinator__prefetch_nvme", "__compatible_ops__", "adam_update",
    "averaged_gradients", "bit16_groups", "bit16_groups_flat", "check_overflow", "checkpoint_event_epilogue",
    "ds_numel", "ds_opt_adam", "ds_shape", "ds_tensor", "empty_partition_cache", "fp16_groups",
    "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat", "get_param_coordinator",
    "grad_partitions_flat_buffer", "parallel_partitioned_bit16_groups", "parameter_offload",
    "partition_numel", "reset_step", "scaled_global_norm", "single_partition_of_fp32_groups",
)  # fmt: skip
DEEPSPEED_ENGINE = {  # its public methods and attributes
    "backward", "eval", "get_global_grad_norm", "is_gradient_accumulation_boundary", "skipped_steps", "step", "train",
    "training",
}  # fmt: skip


def test_one_file_touches_what_deepspeed_keeps_to_itself():
    owner = ROOT / "trainer/zero/partition.py"
    assert [name for name in DEEPSPEED_PRIVATE if name not in owner.read_text(encoding="utf-8")] == []
    wrong = []
    for package in ALLOWED:
        for path in sources(package):
            if path == owner:
                continue
            for node in ast.walk(parse(path)):
                named = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", None)
                wrong += [f"{path.relative_to(ROOT)}: {name}" for name in DEEPSPEED_PRIVATE if name == named]
    assert not wrong, wrong


def test_the_engine_asks_deepspeed_for_public_things_alone():
    tree = parse(ROOT / "trainer/zero/engine.py")
    asked = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "_engine"
    }
    assert asked <= DEEPSPEED_ENGINE, asked - DEEPSPEED_ENGINE


def test_no_class_name_stands_twice():
    """One word, one thing, across all packages."""
    places: dict[str, list[str]] = {}
    for path in (path for package in ALLOWED for path in sources(package)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_every_file_says_what_lives_in_it():
    silent = [
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in sources(package)
        if not ast.get_docstring(parse(path))
    ]
    assert not silent, silent


def test_sources_are_ascii_and_of_readable_length():
    for package in ALLOWED:
        for path in sources(package):
            text = path.read_text(encoding="utf-8")
            assert text.isascii(), f"{path}: non-ASCII character"
            assert text.count("\n") <= 500, f"{path}: over 500 lines"
