"""Metadata of megactx and its optional C++ extension; the build backend and the tool settings are in pyproject.toml.

`kernels/` lies beside `megactx/` and is imported as `megactx.kernels` through a committed symbolic link. Where a
checkout could not make the link (it became a text file), `package_dir` maps the folder instead.

The extension `megactx.kernels._C` implements operators on the CPU against torch's stable ABI. MEGACTX_BUILD_CPP says
whether to build it: `1` always (a failure is an error), `0` never, `auto` (the default) where torch can be imported
and a compiler exists; a failure then costs the speed, not the installation.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
# Hugging Face distributes a package named `kernels`, with a setuptools entry point: run from here, setuptools would
# look for it in our folder of that name.
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]

LINKED = (ROOT / "megactx" / "kernels").is_dir()
PACKAGES = find_packages(str(ROOT), include=["megactx", "megactx.*"])
if not LINKED:
    PACKAGES += ["megactx.kernels", *(f"megactx.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.cpp"))
TORCH_FLOOR = (2, 11)  # the oldest torch whose stable ABI the extension asks for; install_requires says the same


def version() -> str:
    text = (ROOT / "megactx" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('megactx/__init__.py must hold a line __version__ = "..."')
    return found.group(1)


def why_no_extension() -> str:
    """Why the extension is not built here: the empty string where it is."""
    wanted = os.environ.get("MEGACTX_BUILD_CPP") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"MEGACTX_BUILD_CPP must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return "MEGACTX_BUILD_CPP=0"
    missing = ""
    if importlib.util.find_spec("torch") is None:
        missing = "torch is not in the build environment (install it first and pass --no-build-isolation)"
    elif shutil.which((os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]) is None:
        missing = "no C++ compiler was found"
    if missing and wanted == "1":
        raise SystemExit(f"MEGACTX_BUILD_CPP=1, but {missing}")
    return missing


def say(reason: str) -> None:
    print(f"megactx: the C++ extension is not built: {reason}; the PyTorch reference runs instead", file=sys.stderr)


class BuildPy(build_py):
    """Says why there is no extension: here, because a build runs this command once and setup.py several times."""

    def run(self) -> None:
        if REASON:
            say(REASON)
        super().run()


class BuildExt(build_ext):
    """Compiles against the installed torch, which is imported here and not for mere metadata."""

    def build_extensions(self) -> None:
        try:
            self._add_torch()
            super().build_extensions()
        except Exception as error:
            if os.environ.get("MEGACTX_BUILD_CPP") == "1":
                raise
            self.extensions = []
            if "bdist_wheel" in self.distribution.command_obj:  # what is left is not tied to a platform
                self.distribution.command_obj["bdist_wheel"].root_is_pure = True
            compiler = isinstance(error, (CompileError, LinkError))  # whose own output says more than its command line
            text = (str(error) or type(error).__name__).splitlines()[0]
            say("the compiler failed, see above" if compiler else text)

    def _add_torch(self) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_FLOOR:
            raise RuntimeError(f"torch >= {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]} is needed, found {torch.__version__}")
        for extension in self.extensions:
            # As system headers: warnings inside torch are not ours to see.
            extension.extra_compile_args += [f"-isystem{path}" for path in include_paths()]
            extension.library_dirs += library_paths()


REASON = why_no_extension()
EXTENSION = Extension(
    "megactx.kernels._C",
    SOURCES,
    depends=[path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.h")],
    define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000")],
    extra_compile_args=[
        *("-O3", "-std=c++20", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"),
        # IEEE results, the same in every clone of a function (attention.cpp says why it asks for fused multiply-adds);
        # no errno, no traps: what vectorisation needs.
        *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    ],
    libraries=["torch_cpu"],
    language="c++",
    py_limited_api=True,
)
TEST = ["pytest>=8", "pytest-benchmark", "pytest-xdist", "hypothesis", "tensorboard"]
readme = ROOT / "README.md"

setup(
    name="megactx",
    version=version(),
    description="Train and sample small GPTs over several aligned token streams, with fused kernels underneath",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=[
        f"torch>={TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}",
        'triton; platform_system == "Linux"',
        "numpy",
        "tiktoken",
        "rich",
        "safetensors",
        "matplotlib",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "import-linter", "build", "wheel"],
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
    },
    packages=PACKAGES,
    package_dir={} if LINKED else {"megactx.kernels": "kernels"},
    package_data={"megactx": ["py.typed"], "megactx.kernels": ["tuned/*.json"]},
    include_package_data=False,
    ext_modules=[] if REASON else [EXTENSION],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={} if REASON else {"bdist_wheel": {"py_limited_api": "cp311"}},
    entry_points={"console_scripts": ["megactx = megactx.cli:main"]},
    zip_safe=False,
)
