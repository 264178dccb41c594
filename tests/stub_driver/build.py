"""Stub CUDA libraries for a machine without a GPU, compiled when they are wanted: a faked H200 that computes nothing.

`libcuda.so.1` and `libnvidia-ml.so.1` stand for the driver, `libcudart.so.13` and the BLAS libraries for what would ask
a real driver more than is documented. Headers, and the names of all functions, come from NVIDIA's own packages.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The headers want this file, which is in the compiler's package; of it a C compiler needs empty names only.
_HOST_DEFINES = "\n".join(
    (
        *(f"#define {name}" for name in ("__host__", "__device__", "__global__", "__device_builtin__", "CUDARTAPI")),
        *(f"#define {name}" for name in ("__cudart_builtin__", "CUDARTAPI_CDECL", "__location__(a)")),
        *(f"#define __device_builtin_{kind}_type__" for kind in ("texture", "surface")),
        *(f"#define {name}(n) __attribute__((aligned(n)))" for name in ("__align__", "__builtin_align__")),
        "",
    )
)
_DECLARED = re.compile(r"\bCUresult\s+(cu[A-Z]\w*)\s*\(")
_TRACED = 'int {name}(void) {{ return fake_unsupported("{name}"); }}\n'
_SILENT = "int {name}(void) {{ return 0; }}\n"


class StubError(Exception):
    """The stub libraries cannot be made here."""


def declared_functions(preprocessed: str) -> list[str]:
    """Names of the driver's functions in what the preprocessor makes of cuda.h, with their version suffixes."""
    return sorted(set(_DECLARED.findall(preprocessed)))


def exported_functions(table: str) -> list[str]:
    """Names of functions in what `nm -D --defined-only` prints, without versions."""
    rows = (line.split() for line in table.splitlines())
    return sorted({row[2].partition("@")[0] for row in rows if len(row) == 3 and row[1] in "TWi"})


def fillers(names: Iterable[str], present: Iterable[str], traced: bool) -> str:
    """C source of the functions in `names` that are not `present`: they answer "not supported", or success."""
    missing = sorted(set(names) - set(present))
    head = "int fake_unsupported(const char *name);\n" if traced else ""
    return head + "".join((_TRACED if traced else _SILENT).format(name=name) for name in missing)


def environment(directory: Path, base: dict[str, str]) -> dict[str, str]:
    """Of a process that finds the stubs first. The runtime is preloaded: torch looks beside itself first."""
    paths = [str(directory), *filter(None, [base.get("LD_LIBRARY_PATH")])]
    preload = [str(directory / name) for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")]
    return {
        **base,
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "LD_PRELOAD": " ".join(preload),
        "TRITON_LIBCUDA_PATH": str(directory),
    }


def build(nvidia: Path, directory: Path) -> None:
    """Compile all stubs into `directory`.

    Args:
        nvidia: `nvidia/cu13` of an environment that has NVIDIA's runtime packages: `include` and `lib`.

    Raises:
        StubError: no such packages, no compiler, or what it says.
    """
    if not (nvidia / "include" / "cuda.h").is_file():
        raise StubError(f"no cuda.h in {nvidia / 'include'}. Install torch with CUDA 13 there (nvidia-cuda-runtime).")
    (directory / "crt").mkdir(parents=True, exist_ok=True)
    (directory / "crt" / "host_defines.h").write_text(_HOST_DEFINES)
    include = [f"-I{HERE}", f"-I{directory}", f"-I{nvidia / 'include'}"]
    header = directory / "all.c"
    header.write_text("#include <cuda.h>\n")
    declared = declared_functions(_run(["gcc", "-E", *include, str(header)]))
    _library(directory, "libcuda.so.1", ["driver.c", "memory.c", "work.c"], include, declared, traced=True)
    on_driver = [*include, f"-L{directory}", "-l:libcuda.so.1"]
    _library(directory, "libnvidia-ml.so.1", ["management.c"], on_driver, ())
    names = exported_functions(_run(["nm", "-D", "--defined-only", str(nvidia / "lib" / "libcudart.so.13")]))
    _library(directory, "libcudart.so.13", ["runtime.c", "launches.c"], on_driver, names, traced=True, versioned=True)
    for name, source in (("libcublasLt.so.13", "blaslt.c"), ("libcublas.so.13", "blas.c")):
        names = exported_functions(_run(["nm", "-D", "--defined-only", str(nvidia / "lib" / name)]))
        _library(directory, name, [source], on_driver, names, versioned=True)


def _library(
    directory: Path,
    name: str,
    sources: Sequence[str],
    flags: Sequence[str],
    names: Iterable[str],
    traced: bool = False,
    versioned: bool = False,
) -> None:
    """One library of our sources, and of fillers for the other `names`."""
    compiler = ["gcc", "-std=gnu11", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-deprecated-declarations"]
    objects = []
    for source in sources:
        objects.append(str(directory / f"{name}.{source}.o"))
        _run([*compiler, *(f for f in flags if f.startswith("-I")), "-c", str(HERE / source), "-o", objects[-1]])
    present = [row.split()[-1] for row in _run(["nm", "--defined-only", *objects]).splitlines() if " T " in row]
    filler = directory / f"{name}.c"
    filler.write_text(fillers(names, present, traced))
    version = directory / f"{name}.map"
    version.write_text(f"{name} {{ global: *; }};\n")
    link = [*compiler, "-shared", str(filler), *objects, f"-Wl,-soname,{name}", "-fno-builtin"]
    if versioned:
        link.append(f"-Wl,--version-script={version}")
    libraries = [f for f in flags if f.startswith(("-L", "-l"))]
    _run([*link, *libraries, f"-Wl,-rpath,{directory}", "-ldl", "-lpthread", "-o", str(directory / name)])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise StubError(f"{command[0]}: {e}. Install gcc and binutils.") from e
    if done.returncode != 0:
        raise StubError(f"{' '.join(command[:3])} ...: {done.stderr.strip()[-2000:]}")
    return done.stdout
