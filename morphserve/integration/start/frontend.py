"""Front ends of vLLM's other than its Python API server: nothing of MorphServe that lives in that exists there."""

from __future__ import annotations

import argparse
import sys

from morphserve.errors import ConfigError

_RUST = "VLLM_USE_RUST_FRONTEND"


def check_frontend(args: argparse.Namespace) -> None:
    """Refuse a server that nobody could watch, order or have shed.

    Raises:
        ConfigError: what has been started is another front end than the Python API server, or would start one.
    """
    module = _started_module()
    if module.startswith("vllm.") and module.endswith(".grpc_server"):
        raise ConfigError(_refusal(f"python -m {module}", "gRPC server", "Start `vllm serve`."))
    if getattr(args, "subparser", None) != "serve":
        return
    if getattr(args, "grpc", False):
        raise ConfigError(_refusal("--grpc", "gRPC server", "Leave out --grpc."))
    from vllm import envs

    if getattr(envs, _RUST, False) and not getattr(args, "headless", False):
        raise ConfigError(_refusal(f"{_RUST}=1", "Rust front end", f"Unset {_RUST}."))


def _started_module() -> str:
    """Return the module that `python -m` has started, or nothing."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "" if spec is None else str(spec.name)


def _refusal(value: str, frontend: str, remedy: str) -> str:
    return (
        f"{value}: vLLM's {frontend} has no /morphserve, no morphserve metrics, orders or reload, and sheds nothing; "
        f"only its Python API server has. {remedy}"
    )
