"""The child of check_packed.py: runs in an environment with a CUDA vLLM and a stub driver, prints one row a check.

Not called by hand. Each row is a line of JSON: {"row": NAME, "ok": BOOL, "detail": TEXT}. Sections are run in
processes of their own (argument 1), as some can only be run once in a process.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from morphserve.errors import MorphServeError
from morphserve.integration import seams
from morphserve.integration.seams import CUDA_KERNEL_SEAMS, CUDA_SEAMS
from morphserve.version import SUPPORTED_VLLM, UNPROVEN_CUDA, UNPROVEN_VLLM

# Of a Llama-8B without options; docs/gpu.md claims the same.
EXPECTED = {
    "runner V2": True,
    "graphs": "FULL_AND_PIECEWISE",
    "compilation mode": "VLLM_COMPILE",
    "async scheduling": True,
    "attention": "FLASH_ATTN",
}
_LIBRARIES = ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa3_C", "cumem_allocator", "spinloop")
_KERNELS = ("marlin_gemm", "cutlass_scaled_mm")


_rows = sys.stdout


class Missed(Exception):
    """A check has found something else than it wants."""


def keep_rows_apart() -> None:
    """Rows to stdout, everything else to stderr: vLLM and what it loads log to both."""
    global _rows
    _rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def row(name: str, check: Callable[[], str]) -> None:
    """Run one check and print what came of it."""
    try:
        ok, detail = True, check()
    except Exception as e:
        ok, detail = False, f"{type(e).__name__}: {e}".splitlines()[0]
        if not isinstance(e, Missed):
            traceback.print_exc()
    print(json.dumps({"row": name, "ok": ok, "detail": detail}), file=_rows, flush=True)


def libraries() -> None:
    for name in _LIBRARIES:
        row(f"library {name}", partial(_imported, f"vllm.{name}"))
    row("kernels", _kernels)
    row("platform", _platform)
    # What vLLM 0.33 imports while it warms up, whatever the model: a package that lacks shows only there.
    row("warm-up", partial(_imported, "vllm.model_executor.warmup.minimax_m3_msa_warmup"))
    row("flashinfer", _flashinfer)


def _imported(name: str) -> str:
    return importlib.import_module(name).__name__


def _kernels() -> str:
    import torch
    import vllm._custom_ops  # noqa: F401  registers them

    return want(", ".join(name for name in _KERNELS if hasattr(torch.ops._C, name)), ", ".join(_KERNELS))


def _platform() -> str:
    import torch
    from vllm.platforms import current_platform

    want(current_platform.is_cuda() and current_platform.has_device_capability(90), True)
    return f"cuda, sm_90, {torch.cuda.get_device_name()}, torch {torch.__version__}"


def _flashinfer() -> str:
    """Not required: without it a start needs one setting more."""
    there = importlib.util.find_spec("flashinfer") is not None
    return "there" if there else "absent: an engine needs VLLM_USE_FLASHINFER_SAMPLER=0"


def live_seams() -> None:
    with patch.dict(os.environ, {UNPROVEN_VLLM: "1"}):  # it may be one to be tried, not one that is supported
        row("seam version", lambda: _told(seams.check_version()))
    for table in (seams.SEAMS, CUDA_SEAMS, CUDA_KERNEL_SEAMS):
        for seam in table:
            row(f"seam {seam.name}", partial(_hold, seam))


def _hold(seam: seams.Seam) -> str:
    return _told(seams.check_seam(seam))


def _told(result: seams.SeamResult) -> str:
    if not result.ok:
        raise Missed(result.detail)
    return result.detail


def config() -> None:
    found = resolved(engine_config())
    for name, expected in EXPECTED.items():
        row(f"config {name}", partial(want, found[name], expected))


def engine_config(**options: Any) -> Any:
    """vLLM's own configuration of the model in the working directory."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": os.getcwd(), "load_format": "dummy", "skip_tokenizer_init": True, **options}
    return EngineArgs(**arguments).create_engine_config()


def resolved(vllm_config: Any) -> dict[str, Any]:
    """What is in EXPECTED, of a VllmConfig."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    model = vllm_config.model_config
    selector = AttentionSelectorConfig(
        head_size=model.get_head_size(), dtype=model.dtype, kv_cache_dtype="auto", block_size=16
    )
    any_backend: Any = None
    path = current_platform.get_attn_backend_cls(any_backend, selector)
    return {
        "runner V2": vllm_config.use_v2_model_runner,
        "graphs": vllm_config.compilation_config.cudagraph_mode.name,
        "compilation mode": vllm_config.compilation_config.mode.name,
        "async scheduling": vllm_config.scheduler_config.async_scheduling,
        "attention": seams.resolve(":".join(path.rsplit(".", 1)))[2].get_name(),
    }


def plugin() -> None:
    row("entry point", _entry_point)
    os.environ.pop(UNPROVEN_CUDA, None)
    row("refused without " + UNPROVEN_CUDA, lambda: refused(_with_plugin, _reason()))
    os.environ[UNPROVEN_CUDA] = "1"
    row("accepted with it", _accepted)
    row("plugin's configuration is vLLM's", _same_configuration)


def _entry_point() -> str:
    from vllm.plugins import load_general_plugins

    found = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "morphserve"]
    want(found, ["morphserve.plugin:register"])
    load_general_plugins()  # type: ignore[no-untyped-call]
    from vllm.engine.arg_utils import EngineArgs

    want("create_engine_config" in {patch.name for patch in seams.patches() if patch.owner is EngineArgs}, True)
    return str(found[0])


def _reason() -> str:
    """Words of the refusal that comes first: of the version, where it is outside of the supported range."""
    return UNPROVEN_CUDA if seams.check_version().ok else SUPPORTED_VLLM


def _with_plugin(**options: Any) -> Any:
    return engine_config(additional_config={"morphserve": {}}, **options)


def _accepted() -> str:
    from morphserve.integration.start import for_this_device, read_settings, serving_residence

    found = _with_plugin()
    want(found.parallel_config.worker_extension_cls.rpartition(".")[2], "MorphServeWorker")
    want(serving_residence().__name__, "PagedResidence")
    settings = read_settings(found.additional_config)
    assert settings is not None
    steps = for_this_device(settings, found).ladder.steps or []
    return "ladder " + want([step.format for step in steps], ["fp8"])


def _same_configuration() -> str:
    return want(resolved(_with_plugin()), resolved(engine_config()))


def refusals() -> None:
    """Each row of integration/start/device_checks.py, on configurations that vLLM makes itself where it lets us."""
    os.environ[UNPROVEN_CUDA] = "1"
    importlib.import_module("morphserve.plugin").register()
    row("nothing to refuse", _passes)
    for name, options, words in (
        ("cpu_offload_gb", {"cpu_offload_gb": 1}, "--cpu-offload-gb"),
        ("offload_group_size", {"offload_group_size": 2}, "--offload-group-size"),
        ("a quantized base", {"quantization": "fp8"}, "quantiz"),
        ("lora", {"enable_lora": True}, "--enable-lora"),
        ("speculation", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative"),
        ("sleep mode", {"enable_sleep_mode": True}, "--enable-sleep-mode"),
    ):
        row(f"refused {name}", partial(refused, _with_plugin, words, **options))
    plain = engine_config()
    for name, part, field, value, words in (
        ("context parallel", "parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("prefill context", "parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("microbatches", "parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("offload backend", "offload_config", "offload_backend", "uva", "--offload-backend"),
        ("HiSparse", "attention_config", "hisparse_config", SimpleNamespace(), "HiSparse"),
        ("partition", "compilation_config", "use_inductor_graph_partition", True, "use_inductor_graph_partition"),
    ):
        row(f"refused {name}", partial(refused, _check_changed, words, plain, part, field, value))


def _passes() -> str:
    from morphserve.integration.start import check_device

    check_device(engine_config())
    return "passes"


def _check_changed(vllm_config: Any, part: str, field: str, value: Any) -> None:
    from morphserve.integration.start import check_device

    check_device(changed(vllm_config, part, field, value))


def changed(vllm_config: Any, part: str, field: str, value: Any) -> Any:
    """A copy whose `part` is vLLM's own object with one field set; the field must be there already."""
    changed_part = copy.copy(getattr(vllm_config, part))
    if not hasattr(changed_part, field):
        raise Missed(f"{part} of this vLLM has no {field}")
    setattr(changed_part, field, value)
    whole = copy.copy(vllm_config)
    setattr(whole, part, changed_part)
    return whole


def refused(call: Callable[..., Any], words: str, *args: Any, **options: Any) -> str:
    """The message of the refusal.

    Raises:
        Missed: it was not refused, or for another reason.
    """
    try:
        call(*args, **options)
    except MorphServeError as e:
        if words in str(e):
            return str(e).replace("\n", " ")
        raise Missed(f"refused, without {words!r}: {e}") from e
    raise Missed(f"not refused; a message with {words!r} was due")


def wraps() -> None:
    """The worker's seams and the engine core's, installed on the modules of this vLLM."""
    worker = importlib.import_module("morphserve.integration.worker.worker")
    engine = importlib.import_module("morphserve.integration.engine.wiring")
    engine.install()
    num_patches = len(seams.patches())
    worker.install_worker_seams()
    row("installing twice", partial(want, len(seams.patches()), num_patches))
    for one in seams.patches():
        target = f"{getattr(one.owner, '__module__', '')} {one.owner.__name__}.{one.name}".strip()
        row(f"wrap {target}", partial(_in_place, one))
    row("all are undone", _undone)


def _in_place(one: seams.Patch) -> str:
    want(vars(one.owner)[one.name] is one.before, False)
    stray = sorted(holders_of(one.before) - {getattr(one.owner, "__name__", "")})
    return "in place" + (f"; also held, unwrapped, by {', '.join(stray)}" if stray else "")


def holders_of(function: Any) -> set[str]:
    """Modules of vLLM that hold a function by a name of their own."""
    return {
        name
        for name, module in list(sys.modules.items())
        if name.startswith("vllm.") and any(value is function for value in list(vars(module).values()))
    }


def _undone() -> str:
    before = seams.patches()
    if not before:
        raise Missed("nothing was installed")
    seams.undo()
    for one in before:
        want(one.in_place, False)
    want(seams.patches(), [])
    return f"{len(before)} originals are back"


def want(found: Any, expected: Any) -> str:
    """`found` in words, if it is what was expected."""
    if found != expected:
        raise Missed(f"found {found!r}, expected {expected!r}")
    return str(found)


SECTIONS = {
    "libraries": libraries,
    "seams": live_seams,
    "config": config,
    "plugin": plugin,
    "refusals": refusals,
    "wraps": wraps,
}


if __name__ == "__main__":
    keep_rows_apart()
    SECTIONS[sys.argv[1]]()
