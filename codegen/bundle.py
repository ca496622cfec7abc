"""Artifacts with all that runs them, in one file: `nas bundle`.

A machine with Python and numpy unpacks it and gives `python run.py check|bench|run|serve`. Inside are the artifacts,
the TVM runtime of their processor, and those modules of this project that loading, timing and serving import. The
runtime is called through its C interface (`codegen.tvm_ctypes`), so any Python from 3.10 on will do.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import importlib.util
import io
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from codegen import container, cross, machine
from ir.errors import InputError, StorageError, TargetUnavailable
from ir.files import replace_file

LARGEST_BYTES: Final = 60 * 2**20
"""Bound on a bundle, as it is written."""

_ROOTS: Final = ("codegen.bundled", "codegen.workers", "codegen.measure")
_PACKAGES: Final = ("codegen", "ir")
_RUNTIME: Final = "libtvm_runtime.so"
_FFI: Final = "libtvm_ffi.so"
_RUNTIME_CUDA: Final = "libtvm_runtime_cuda.so"
_CUDART: Final = "libcudart.so.13"
_CUDA_FOLDERS: Final = ("/usr/local/cuda/lib64",)
_FOREIGN: Final = "aarch64"

_RUN: Final = '''"""Runs the artifacts beside this file: python run.py check|bench|run|serve. Needs numpy 2.1."""

import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
sys.path.insert(0, str(folder / "lib"))
try:
    import numpy
except ImportError:
    sys.exit("error: numpy is not installed; pip install 'numpy>=2.1'")
from codegen.bundled import main

sys.exit(main(folder))
'''

_README: Final = """Compiled models, and what runs them on {architecture} Linux with Python >= 3.10 and numpy >= 2.1.

python run.py check              checks each artifact and runs its self-test
python run.py bench              times each artifact
python run.py run NAME --input NAME=FILE.npy --out outputs.npz
python run.py serve --help       offers this machine for measuring, for `nas search --device HOST:PORT`

Artifacts:
{artifacts}
lib/native holds libraries of Apache TVM (Apache License 2.0); licenses are in lib/*.dist-info.
"""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written.

    Attributes:
        path: File or folder.
        size_bytes: Of the file, or of all files of the folder.
        parts: Bytes by part, unpacked: `artifacts`, `runtime`, `python`.
    """

    path: Path
    size_bytes: int
    parts: Mapping[str, int]


def write_bundle(artifacts: Sequence[str | Path], path: str | Path, *, largest_bytes: int = LARGEST_BYTES) -> Bundle:
    """Write artifacts with what runs them.

    Args:
        artifacts: `.nas` files, all for one processor.
        path: A file that ends in `.tar.gz` or `.tgz`, or a folder that is not there yet.
        largest_bytes: Bound on what is written.

    Raises:
        ArtifactError: A file is damaged.
        InputError: The artifacts do not go together, the path is taken, or the bundle is too large.
        TargetUnavailable: The runtime for their processor is not here.
        StorageError: It cannot be written.
    """
    path = Path(path)
    is_file = path.name.endswith((".tar.gz", ".tgz"))
    if not is_file and path.exists():
        raise InputError(
            "the bundle must be a new folder or a .tar.gz",
            where="-o",
            expected="a path without a file",
            found=str(path),
        )
    parts = collect(artifacts)
    files = {name: data for members in parts.values() for name, data in members.items()}
    sizes = {part: sum(map(len, members.values())) for part, members in parts.items()}
    top = path.name.removesuffix(".tar.gz").removesuffix(".tgz")
    packed = _pack(top, files) if is_file else b""
    size = len(packed) if is_file else sum(sizes.values())
    if size > largest_bytes:
        part = max(sizes, key=lambda name: sizes[name])
        name, data = max(parts[part].items(), key=lambda item: len(item[1]))
        raise InputError(
            "the bundle is too large",
            where=str(path),
            expected=f"at most {largest_bytes / 2**20:.0f} MiB",
            found=f"{size / 2**20:.1f} MiB, of which most are {part} ({sizes[part] / 2**20:.1f} MiB unpacked)",
            hint=f"the largest file is {name} with {len(data) / 2**20:.1f} MiB; bundle fewer or smaller artifacts",
        )
    try:
        if is_file:
            replace_file(path, packed)
        else:
            for name, data in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(data)
    except OSError as error:
        raise StorageError("cannot write the bundle", where=str(path), found=error.strerror) from error
    return Bundle(path, size, sizes)


def collect(artifacts: Sequence[str | Path]) -> dict[str, dict[str, bytes]]:
    """Return the files of a bundle, by part and by name.

    Raises:
        ArtifactError: An artifact is damaged.
        InputError: They do not go together.
        TargetUnavailable: The runtime for their processor is not here.
    """
    found = [(Path(path), container.read(path).manifest) for path in artifacts]
    names = [path.name for path, _ in found]
    if not names or len(set(names)) < len(names):
        raise InputError(
            "bad artifacts", expected="one or more, with different names", found=", ".join(names) or "none"
        )
    architecture = _common(found)
    with_cuda = any(manifest["target"].get("gpu", {}).get("kind") == "cuda" for _, manifest in found)
    native = {f"lib/native/{path.name}": path.read_bytes() for path in _libraries(architecture, with_cuda)}
    listed = "".join(f"  {path.name}  {manifest['target']['fingerprint']}\n" for path, manifest in found)
    sources = {f"lib/{name}": data for name, data in _sources().items()}
    texts = {
        "run.py": _RUN.encode(),
        "README.txt": _README.format(architecture=architecture, artifacts=listed).encode(),
    }
    return {
        "artifacts": {f"artifacts/{path.name}": path.read_bytes() for path, _ in found},
        "runtime": {**native, **_metadata()},
        "python": {**sources, **texts},
    }


def _common(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """Return the processor architecture of artifacts that can share a runtime."""
    architectures = {manifest["target"]["architecture"] for _, manifest in found}
    if len(architectures) > 1:
        raise InputError(
            "a bundle is for one processor", expected="artifacts of one architecture", found=", ".join(architectures)
        )
    here = machine.versions()
    for path, manifest in found:
        if "android" in manifest["target"].get("triple", ""):
            raise TargetUnavailable(
                "there is no TVM runtime for Android here",
                where=str(path),
                expected="an artifact for Linux",
                hint="`nas compile --format c` writes a model that needs no runtime",
            )
        made_with = {name: manifest["versions"][name] for name in ("tvm", "tvm_ffi")}
        if any(_release(made_with[name]) != _release(here[name]) for name in made_with):
            raise InputError(
                "the artifact was compiled for another TVM runtime than the one here",
                where=str(path),
                expected=f"tvm {here['tvm']}, tvm_ffi {here['tvm_ffi']}",
                found=f"tvm {made_with['tvm']}, tvm_ffi {made_with['tvm_ffi']}",
                hint="compile it again",
            )
    return architectures.pop()


def _release(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _libraries(architecture: str, with_cuda: bool) -> list[Path]:
    """Find the libraries of the runtime."""
    if architecture == platform.machine():
        own = [_package("tvm") / "lib" / _RUNTIME, _package("tvm_ffi") / "lib" / _FFI]
        return own + (_cuda_libraries() if with_cuda else [])
    folder = cross.runtime_folder() if architecture == _FOREIGN else None
    if folder is None:
        raise TargetUnavailable(
            f"the TVM runtime for {architecture} is not here",
            where="bundle",
            expected=f"an artifact for {platform.machine()}, or for {_FOREIGN} with its runtime",
            found=architecture,
            hint="`make cross-deps` fetches the one for 64-bit Arm",
        )
    return [folder / _RUNTIME, folder / _FFI]


def _cuda_libraries() -> list[Path]:
    """Find what drives a GPU; its driver is the other machine's."""
    part = _package("tvm") / "lib" / _RUNTIME_CUDA
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) / "cu13" / "lib" for folder in (spec.submodule_search_locations or ())] if spec else []
    runtime = [folder / _CUDART for folder in (*wheels, *map(Path, _CUDA_FOLDERS)) if (folder / _CUDART).is_file()]
    return [path for path in (part, *runtime[:1]) if path.is_file()]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise TargetUnavailable("the TVM runtime is not installed", expected=f"the package {name}", found="none")
    return Path(spec.submodule_search_locations[0])


def _metadata() -> dict[str, bytes]:
    """Return names, versions and licenses of what is packed, as installed packages have them."""
    files: dict[str, bytes] = {}
    for distribution in ("nas", "apache-tvm", "apache-tvm-ffi"):
        found = importlib.metadata.distribution(distribution)
        folder = f"lib/{distribution.replace('-', '_')}-{found.version}.dist-info"
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {found.version}\n"
        files[f"{folder}/METADATA"] = text.encode()
        for file in found.files or ():
            if file.parent.name == "licenses":
                files[f"{folder}/{file.name}"] = Path(str(found.locate_file(file))).read_bytes()
    return files


def _sources() -> dict[str, bytes]:
    """Return the modules that the roots import, wherever in them, with their packages."""
    root, files, due = Path(__file__).parents[1], dict[str, bytes](), list(_ROOTS)
    while due:
        module = due.pop()
        stem = root / module.replace(".", "/")
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        name = path.relative_to(root).as_posix()
        if name in files or not path.is_file():
            continue
        files[name] = path.read_bytes()
        due += [found for found in _imports(files[name]) if found.split(".")[0] in _PACKAGES]
        due += [module.rpartition(".")[0]] if "." in module else []
    return files


def _imports(source: bytes) -> list[str]:
    """List what a module imports, and what may be modules among it, types aside."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    return finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_If(self, node: ast.If) -> None:  # a name of `ast`
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module is not None:
            self.found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def _pack(top: str, files: Mapping[str, bytes]) -> bytes:
    """Return a tar.gz; the same files give the same bytes."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size, entry.mode = len(data), 0o755 if name.endswith(".so") else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
