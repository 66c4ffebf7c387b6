"""What gets installed, and that it works elsewhere: wheels, the link, builds without torch, imports without effects.

Builds run in a copy of the project, against the packages of this environment: nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import megactx

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "kernels", "megactx")
NOT_BUILT = "the C++ extension is not built"


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "kernels" not in path.relative_to(ROOT).parts[1:]:  # each file once, not again through the link
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def python(script: str, *, cwd: Path = ROOT, executable: str | Path = sys.executable, **environment: str) -> str:
    """Runs a script in a fresh interpreter; its two outputs together."""
    answer = subprocess.run(
        [executable, "-c", script],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what git would hold, so that builds neither see nor leave anything in the working tree."""
    target = tmp_path / "project"
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def without_torch(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that holds setuptools alone, as an isolated build environment does."""
    folder = tmp_path / "only_setuptools"
    folder.mkdir()
    spec = importlib.util.find_spec("setuptools")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parent.parent
    for path in (site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*.dist-info")):
        (folder / path.name).symlink_to(path)
    return folder


def build(project: Path, target: str, *, only: Path | None = None, **environment: str) -> tuple[Path, str]:
    """Calls the build backend as pip does; the file it made and what it printed."""
    out = project.parent / "out"
    script = f"import setuptools.build_meta as b; print('BUILT', b.build_{target}({str(out)!r}))"
    if only is None:
        printed = python(script, cwd=project, **environment)
    else:
        bare = project.parent / "bare"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
        printed = python(script, cwd=project, executable=bare / "bin" / "python", PYTHONPATH=str(only), **environment)
    return out / re.findall(r"^BUILT (.+)$", printed, re.MULTILINE)[0], printed


# --- imports


def test_importing_the_packages_loads_nothing_heavy() -> None:
    script = "import sys, megactx, megactx.kernels; print({'torch', 'triton', 'numpy', 'rich'} & set(sys.modules))"
    assert python(script).strip() == "set()"


def test_kernels_stand_alone() -> None:
    """The folder works under another name, with megactx out of reach: it could be published by itself."""
    script = f"""
import importlib.util, sys
sys.modules["megactx"] = None
spec = importlib.util.spec_from_file_location("elsewhere", {str(ROOT / "kernels" / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT / "kernels")!r}])
elsewhere = sys.modules["elsewhere"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(elsewhere)
import torch
print([getattr(elsewhere, name) is not None for name in elsewhere.__all__].count(False))
print(elsewhere.sample_contexts(torch.tensor([[0.0, 9.0, 0.0]]), [3], temperature=0.0, seeds=1, step=0).item())
"""
    assert python(script).split() == ["0", "1"]


def test_kernels_work_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from megactx import kernels
[getattr(kernels, name) for name in kernels.__all__]
print(kernels.sample_contexts(torch.tensor([[0.0, 9.0, 0.0]]), [3], temperature=0.0, seeds=1, step=0).item())
print(all(row["reference"] == "live" for row in kernels.backends().values()))
"""
    assert python(script).split() == ["1", "True"]


def test_the_top_level_name_kernels_is_never_imported() -> None:
    """Hugging Face distributes a package of that name; two names for ours would register every operator twice."""
    for path, tree in sources("kernels", "megactx", "bench", "tests"):
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "kernels"], f"{path}:{node.lineno}"  # type: ignore[attr-defined]


BANNED_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen", "np.load", "numpy.load"}


def test_nothing_that_runs_code_from_a_file() -> None:
    """Checkpoints and datasets come from strangers: no pickle, eval, exec, torch.load or shell in the packages."""
    for path, tree in sources("kernels", "megactx"):
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not BANNED_MODULES & {name.split(".")[0] for name in modules}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in BANNED_CALLS, f"{path}:{node.lineno}"
                shell = [keyword for keyword in node.keywords if keyword.arg in ("shell", "allow_pickle")]
                assert not shell, f"{path}:{node.lineno}"


# --- the layout


def test_the_link_is_a_relative_link() -> None:
    assert os.readlink(ROOT / "megactx" / "kernels") == "../kernels"


def test_version_is_written_once(project: Path) -> None:
    (project / "megactx" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    answer = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=project, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[-1] == "9.8.7"


def test_setup_takes_no_notice_of_a_package_called_kernels(project: Path, tmp_path: Path) -> None:
    """That distribution adds a setuptools entry point, which must not be looked for in our folder."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("")
    (site / "kernels" / "locking.py").write_text("def write(cmd, name, path):\n    print('ENTRY POINT')\n")
    (site / "kernels-1.0.dist-info").mkdir()
    (site / "kernels-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\n")
    (site / "kernels-1.0.dist-info" / "entry_points.txt").write_text(
        "[egg_info.writers]\nkernels.lock = kernels.locking:write\n"
    )
    answer = subprocess.run(
        [sys.executable, "setup.py", "egg_info", "--egg-base", tmp_path],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(site), "MEGACTX_BUILD_CPP": "0"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert "ENTRY POINT" in answer.stdout


# --- builds


@pytest.mark.slow
@pytest.mark.parametrize("link", ["link", "text file"])
def test_a_wheel_without_the_extension(project: Path, link: str) -> None:
    """Also from a checkout in which the link became a text file, as on file systems without links."""
    if link == "text file":
        (project / "megactx" / "kernels").unlink()
        (project / "megactx" / "kernels").write_text("../kernels")
    wheel, printed = build(project, "wheel", MEGACTX_BUILD_CPP="0")
    assert wheel.name == f"megactx-{megactx.__version__}-py3-none-any.whl"
    assert printed.count(NOT_BUILT) == 1
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    python_files = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    assert {f"megactx/kernels/{path.as_posix()}" for path in python_files} <= packed
    assert "megactx/py.typed" in packed
    assert {name.split("/")[0] for name in packed} == {"megactx"}
    assert not [name for name in packed if name.endswith(".so")]


@pytest.mark.slow
def test_a_source_distribution_builds(project: Path, tmp_path: Path) -> None:
    (project / "tests").mkdir()
    (project / "tests" / "test_something.py").write_text("")
    sdist, _ = build(project, "sdist", MEGACTX_BUILD_CPP="0")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "tests").exists()  # half a test suite: its shared parts are not shipped
    assert sorted(p.name for p in (unpacked / "csrc").iterdir()) == sorted(p.name for p in (ROOT / "csrc").iterdir())
    wheel, _ = build(unpacked, "wheel", MEGACTX_BUILD_CPP="0")
    assert "megactx/kernels/sampling/reference.py" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_without_torch_the_build_succeeds_and_says_so_once(project: Path, without_torch: Path) -> None:
    wheel, printed = build(project, "wheel", only=without_torch, MEGACTX_BUILD_CPP="auto")
    assert wheel.name.endswith("py3-none-any.whl")
    assert printed.count(NOT_BUILT) == 1
    assert "torch is not in the build environment" in printed


def test_an_error_without_text_costs_the_speed_and_not_the_installation(project: Path, tmp_path: Path) -> None:
    """A torch that cannot be imported, and says nothing."""
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text("raise ImportError\n")
    script = "import sys, runpy; sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py')"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "MEGACTX_BUILD_CPP": "auto", "CXX": sys.executable}
    assert f"{NOT_BUILT}: ImportError;" in python(script, cwd=project, **environment)


@pytest.mark.slow
def test_without_a_working_compiler_auto_goes_on_and_1_stops(project: Path) -> None:
    broken = {"CC": "false", "CXX": "false"}
    wheel, printed = build(project, "wheel", MEGACTX_BUILD_CPP="auto", **broken)
    assert wheel.name.endswith("-any.whl")
    assert printed.count(NOT_BUILT) == 1
    assert "the compiler failed" in printed
    with pytest.raises(AssertionError, match=r"returned non-zero exit status|failed with exit code"):
        build(project, "wheel", MEGACTX_BUILD_CPP="1", **broken)


@pytest.mark.slow
def test_a_wheel_works_in_another_environment(project: Path, tmp_path: Path) -> None:
    """Installed into a clean environment, used from another folder: the operators run, compiled."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    wheel, printed = build(project, "wheel", MEGACTX_BUILD_CPP="1")
    assert NOT_BUILT not in printed
    assert "-cp311-abi3-" in wheel.name
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", environment, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    # The dependencies are borrowed by a path in a .pth file; the .pth files there (an editable install) are not read.
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    [site] = (environment / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(f"{Path(spec.origin).parent.parent}\n")
    script = """
import megactx, torch
from megactx import kernels
print(megactx.__file__)
with kernels.use_backend("cpp"):
    print(kernels.sample_contexts(torch.tensor([[0.0, 9.0, 0.0]]), [3], temperature=0.0, seeds=1, step=0).item())
"""
    where, drawn = python(script, cwd=elsewhere, executable=environment / "bin" / "python").split()
    assert Path(where).is_relative_to(site)
    assert drawn == "1"
    answer = subprocess.run([environment / "bin" / "megactx", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"megactx {megactx.__version__}"
