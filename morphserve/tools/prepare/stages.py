"""The parts of a preparation, each skipped where the store has what it would make."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from morphserve.errors import ProfilingError
from morphserve.files import write_whole
from morphserve.prepared import Place, ProfileKey, Store, StoredProfile, moment, take_model
from morphserve.shipped import TEXT
from morphserve.tools.apart import Progress, run_apart
from morphserve.tools.prepare.request import Request

_LENGTH = 512  # tokens of a window
_DRAWS = 2  # answers drawn a token
_MOVES = 5  # changes from level to level, in a model of some thirty layers
_MAX_LEVELS = 15
_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class _Served:
    """What vLLM says that a server would be; see `morphserve.integration.offline.served`."""

    place: Place
    formats: tuple[str, ...]
    in_pages: bool
    levels_of_a_format: int | None  # where layers and KV blocks exchange pages of a device
    with_profile: bool


class Preparation:
    """One run of `morphserve prepare`.

    Attributes:
        said: what there is to say in the end, in lines.
    """

    def __init__(self, request: Request, store: Store, cache_dir: Path, progress: Progress) -> None:
        self._request = request
        self._store = store
        self._cache_dir = cache_dir
        self._progress = progress
        self.said: list[str] = []

    def run(self, text: Sequence[Path] | None, windows: int, w4: str | None, with_times: bool) -> dict[str, Any]:
        """Make what is missing, and return what is where.

        Args:
            text: calibration text; None = what comes along.
            windows: of each file.
            w4: how a checkpoint of 4 bits is made; None = levels of 4 bits are rounded to nearest.
            with_times: step times, too.

        Raises:
            TakenError: another process prepares this model.
            MorphServeError: a part of it cannot be made; what was finished is kept.
        """
        texts = tuple(file.resolve() for file in text or (TEXT,))
        for file in texts:
            if not file.is_file():
                raise ProfilingError(f"--text {file}: there is no such file. Give text files.")
        self._check_store()
        with take_model(self._store.directory):  # two that go on with the same unfinished part would mix it
            return self._run(texts, windows, w4, with_times)

    def _run(self, texts: tuple[Path, ...], windows: int, w4: str | None, with_times: bool) -> dict[str, Any]:
        start_s = time.monotonic()
        served = self._served()
        place, sources = served.place, {"w4": w4} if w4 is not None and "w4" in served.formats else {}
        if not served.with_profile:
            self._check_without_profile(w4, with_times)
        key = ProfileKey(served.formats, place.dtype, place.tier, sources)
        profile = self._profile(key, texts) if served.with_profile else None
        times = self._times(place) if with_times else None
        wanted = {"profile": served.with_profile and profile is None, "times": with_times and times is None}
        missing = [what for what, is_wanted in wanted.items() if is_wanted]
        if missing:
            self._check_disk(windows * len(texts) if wanted["profile"] else 0, bool(sources))
            self._check_memory(served.in_pages)
        if wanted["profile"]:
            self._remove_damaged(self._store.profile_at(key))
            checkpoints = {fmt: self._checkpoint(fmt, how, texts) for fmt, how in sources.items()}
            profile = self._make_profile(key, texts, windows, checkpoints, served.levels_of_a_format)
        if wanted["times"]:
            times = self._make_times(profile)
        took = f"in {time.monotonic() - start_s:.0f} s" if missing else "already"
        self.said.append(f"prepared {took}: {self._request.model}, served in {place.dtype}")
        self.said += _lines_of(profile, times)
        self.said.append(" ".join(["serve it with: vllm serve", self._request.model, *self._request.server_words,
                                   "--plugin morphserve"]))  # fmt: skip
        return {
            "model": self._request.model,
            "weights": self._store.weights,
            "place": asdict(place),
            "profile": None if profile is None else str(profile),
            "step_times": None if times is None else str(times),
            "made": missing,
            "seconds": round(time.monotonic() - start_s, 1),
        }

    # -- what is there

    def _profile(self, key: ProfileKey, texts: Sequence[Path]) -> Path | None:
        found: StoredProfile | None = next((each for each in self._store.profiles() if each.key == key), None)
        if found is None:
            return None
        wanted = [file.name for file in texts]
        if (text := found.made.get("text", wanted)) != wanted:
            self.said.append(
                f"the profile that is there was made of {', '.join(text)}, and stays. One of {', '.join(wanted)} makes "
                "`morphserve profile`; name it as `profile` in the settings"
            )
        return found.directory

    def _remove_damaged(self, profile: Path) -> None:
        """Make room for a profile where one lies that was not found: what is only out of reach took hours to make."""
        from quant_layers import ProfileError, read_profile

        if not profile.exists():
            return
        why = f"{profile} could not be read a moment ago"
        try:
            read_profile(profile)
        except ProfileError as e:
            cause = e.__cause__
            if not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError | NotADirectoryError):
                shutil.rmtree(profile)
                return
            why = f"{profile} cannot be read ({cause.strerror})"
        raise ProfilingError(f"{why}. It stays. Try again; if it is not to come back, move it away.")

    def _times(self, place: Place) -> Path | None:
        return next((each.file for each in self._store.times() if each.place == place), None)

    def _check_store(self) -> None:
        from quant_layers import private_directory  # torch: only where something is made

        try:
            private_directory(self._store.directory)
            if not os.access(self._store.directory, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as e:
            raise ProfilingError(
                f"{self._store.directory}: {e.strerror}. Give a --cache-dir that can be written, and the server's "
                "settings the same `cache_dir`."
            ) from e

    def _check_without_profile(self, w4: str | None, with_times: bool) -> None:
        """Refuse what only a profile is for: the model's own weights are quantized.

        Raises:
            ProfilingError: nothing is left to do, or more is asked for than can be.
        """
        what = f"{self._request.model} has quantized weights, and a profile is of 16 bits or more"
        how = "`morphserve measure-kl MODEL --formats w4` says what 4 bits cost it, for `ladder.expected_kl`"
        if w4 is not None or not with_times:
            option = "--without-times" if w4 is None else f"--with-w4 {w4}"
            raise ProfilingError(f"{what}: only its step times can be prepared. Leave out {option}; {how}.")
        self.said.append(f"{what}: only step times are prepared. {how}")

    def _check_disk(self, num_windows: int, with_checkpoint: bool) -> None:
        model = Path(self._request.model)
        weights = _weight_bytes(model)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        rows = num_windows * _LENGTH * int(config.get("hidden_size", 0)) * 4
        states = rows * (int(config.get("num_hidden_layers", 0)) + 1 + 2 * _DRAWS)
        needed = states + 2 * weights + (weights // 2 if with_checkpoint else 0)  # as packed, level 0 and all formats
        free = shutil.disk_usage(self._store.directory).free
        if needed > free:
            raise ProfilingError(
                f"{self._store.directory} has {free / 2**30:.1f} GiB free, preparing this model takes up to "
                f"{needed / 2**30:.1f} GiB. Free some, give fewer --windows, or a --cache-dir on a larger disk."
            )

    def _check_memory(self, in_pages: bool) -> None:
        """Refuse where not even the weights fit: what is made is made by engines of this model."""
        from kv_resize import available_bytes

        weights, available = _weight_bytes(Path(self._request.model)), available_bytes()
        if in_pages or available is None or weights <= available:
            return
        raise ProfilingError(
            f"{self._request.model} has {weights / 2**30:.1f} GiB of weights, {available / 2**30:.1f} GiB of memory "
            "are available (what the system has, or a limit of a control group leaves). Free some, raise the limit, or "
            "prepare the model on the machine that will serve it."
        )

    def _served(self) -> _Served:
        """Return where the server will be, and with what: asked of vLLM once, and remembered."""
        r, file = self._request, self._store.directory / f"served-{self._request.name}.json"
        try:
            return _read_served(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._progress("asking vLLM", 0, 0)
        words = ["--model", r.model, "--dtype", r.dtype, *r.parallel_words, "--max-model-len", str(r.max_model_len)]
        words += ["--enforce-eager"] if r.enforce_eager else []
        command = [sys.executable, "-m", "morphserve.integration.offline.served", *words]
        document = run_apart(command, f"{r.model} cannot be served so", "asking vLLM", self._progress)
        write_whole(file, json.dumps(document))
        return _read_served(document)

    # -- what is made

    def _checkpoint(self, fmt: str, how: str, texts: Sequence[Path]) -> Path:
        """Return a checkpoint of the model in `fmt`, quantized with calibration."""
        out = self._store.directory / f"{fmt}-{how}"
        if not out.is_dir():
            what = f"quantizing with {how.upper()}"
            self._progress(what, 0, 0)
            command = [sys.executable, "-m", "morphserve", "quantize", self._request.model, "--method", how]
            command += ["--out", str(out), "--text", *map(str, texts)]
            run_apart(command, f"no {fmt} checkpoint could be made", what, self._progress)
        return out

    def _make_profile(
        self, key: ProfileKey, texts: tuple[Path, ...], windows: int, checkpoints: dict[str, Path], levels: int | None
    ) -> Path:
        from morphserve.tools.profile import ProfileJob, run_profile

        r = self._request
        num_layers = int(json.loads((Path(r.model) / "config.json").read_text())["num_hidden_layers"])
        of_all = num_layers * len(key.formats)
        # On a GPU as the default ladder is cut there: a level has CUDA graphs of its own, and is to be staged whole.
        moves = max(-(-of_all // _MAX_LEVELS), min(_MOVES, -(-num_layers // 6)))
        moves = moves if levels is None else -(-num_layers // levels)
        job = ProfileJob(
            r.model, texts, self._store.profile_at(key), key.formats, windows, _LENGTH, _DRAWS, moves, seed=0,
            sources=tuple(key.sources.items()),
        )  # fmt: skip
        words = ["--dtype", r.dtype, *r.parallel_words, "--cache-dir", str(self._cache_dir)]
        words += [] if r.enforce_eager else ["--compiled"]
        words += [word for fmt, path in checkpoints.items() for word in ("--variant", f"{fmt}={path}")]
        run_profile(job, words, (), self._progress)
        return job.out

    def _make_times(self, profile: Path | None) -> Path:
        r = self._request
        with tempfile.TemporaryDirectory() as scratch:
            out, config = Path(scratch) / "step_times.json", Path(scratch) / "config.yaml"
            settings = {"cache_dir": str(self._cache_dir), **({} if profile is None else {"profile": str(profile)})}
            config.write_text(json.dumps(settings), encoding="utf-8")  # which is YAML whatever directories are called
            command = [sys.executable, "-m", "morphserve.tools.profile.calibrate", r.model, "--out", str(out)]
            command += ["--config", str(config), "--dtype", r.dtype, *r.parallel_words]
            command += ["--cpu-bind", os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")]
            command += ["--max-model-len", str(r.max_model_len), "--max-num-seqs", str(r.max_num_seqs)]
            command += ["--block-size", str(_BLOCK_SIZE)] + (["--enforce-eager"] if r.enforce_eager else [])
            if r.max_num_batched_tokens is not None:
                command += ["--max-num-batched-tokens", str(r.max_num_batched_tokens)]
            self._progress("timing steps", 0, 0)
            done = run_apart(command, "steps could not be timed", "timing steps", self._progress)
            document = json.loads(out.read_text(encoding="utf-8"))
        return self._store.keep_times(document, Place(**done["place"]), moment())


def _weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _read_served(document: dict[str, Any]) -> _Served:
    place, formats = Place(**document["place"]), tuple(document["formats"])
    return _Served(
        place, formats, document["in_pages"], document["levels_of_a_format"], document["with_profile"]
    )


def _lines_of(profile: Path | None, times: Path | None) -> list[str]:
    lines = [] if profile is None else _lines_of_profile(profile)
    return lines + ([] if times is None else [f"step times {times}"])


def _lines_of_profile(profile: Path) -> list[str]:
    from quant_layers import read_profile

    found = read_profile(profile, with_scales=False)
    lines = [f"profile {profile}, {len(found.ladder) - 1} levels"]
    for fmt in found.formats:
        for level in found.ladder:
            if set(level.layers.values()) == {fmt} and len(level.layers) == found.num_layers:
                lines.append(f"  all layers in {fmt}: {level.kl:.4f} nats per token")
    return lines
