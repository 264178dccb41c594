"""Entry point of group `vllm.general_plugins`; vLLM calls `register` in every one of its processes.

Until somebody asks for MorphServe (`--plugin morphserve`, or `additional_config={"morphserve": ...}`),
three call-through wrappers on EngineArgs are all that is there. An exception in `register` would break
every vLLM command on the host, so it never raises.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from morphserve.errors import MorphServeError
from morphserve.integration import ending, seams
from morphserve.integration.start import CONFIG_FILE, KEY, is_active, read_settings
from morphserve.user_input import user_path

logger = logging.getLogger("vllm.morphserve")

SCHEDULER_CLS = "morphserve.integration.engine.scheduler.make_scheduler"
WORKER_EXTENSION_CLS = "morphserve.integration.worker.worker.MorphServeWorker"


def register() -> None:
    """Install the inert part. Re-entrant."""
    try:
        seams.wrap(seams.CLI_FLAGS, _add_cli_args)
        seams.wrap(seams.CLI_VALUES, _from_cli_args)
        seams.wrap(seams.ENGINE_CONFIG, _create_engine_config)
        # In the engine-core process nobody calls create_engine_config; vLLM loads plugins there first
        # thing in EngineCore.__init__, and the wrappers do nothing for a config that is not ours.
        if "vllm.v1.engine.core" in sys.modules:
            install_engine_seams()
        ending.listen()
    except Exception:
        logger.exception("morphserve: could not register; vLLM goes on without it")


def install_engine_seams() -> None:
    """Wrap what the engine-core process needs. Re-entrant; inert for other engines."""
    from morphserve.integration import engine

    engine.install()


def _add_cli_args(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        if not any("--morphserve-config" in action.option_strings for action in parser._actions):
            group = parser.add_argument_group("MorphServe", "Adaptive layer precision and KV capacity.")
            group.add_argument(
                "--plugin", action="append", default=None, choices=[KEY], help="Plugin to enable."
            )
            group.add_argument(
                "--morphserve-config",
                default=None,
                metavar="FILE",
                help="MorphServe YAML; without it the defaults hold, which `morphserve init` writes out.",
            )
        return parser

    return staticmethod(add_cli_args)


def _from_cli_args(original: Callable[..., Any]) -> Any:
    # `original` is bound to EngineArgs; AsyncEngineArgs must get an instance of itself.
    function = getattr(original, "__func__", original)

    @functools.wraps(function)
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        _settings_from_cli(args)
        return function(cls, args)

    return classmethod(from_cli_args)


def _settings_from_cli(args: argparse.Namespace) -> None:
    """Move the two flags into `args.additional_config`. Idempotent: vLLM may call it twice."""
    file = getattr(args, "morphserve_config", None)
    if KEY not in (getattr(args, "plugin", None) or []):
        if file is not None:
            _exit(f"--morphserve-config {file} has no effect without --plugin morphserve. Add it.")
        return
    additional = dict(getattr(args, "additional_config", None) or {})
    try:
        settings = {CONFIG_FILE: str(user_path(file).resolve())} if file else {}
        if file is not None and additional.get(KEY, settings) != settings:
            _exit("settings both in --morphserve-config and in --additional-config. Give one of them.")
        additional.setdefault(KEY, settings)
        read_settings(additional)
    except MorphServeError as e:
        _exit(str(e))
    args.additional_config = additional


def _create_engine_config(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_active(self.additional_config):
            return original(self, *args, **kwargs)
        try:
            ending.arm(_is_cli())
            _activate(self)
            config = original(self, *args, **kwargs)
            from morphserve.integration.start import attach_prepared, check_engine

            attach_prepared(config)
            check_engine(config)
        except MorphServeError as e:
            # On the command line one clear line beats a traceback of vLLM's start-up.
            if _is_cli():
                _exit(str(e))
            raise
        except Exception as e:  # of vLLM's, above which stands its stack
            ending.note(e)
            raise
        return config

    return create_engine_config


def _activate(engine_args: Any) -> None:
    """Check and prepare everything that must hold before vLLM's own start-up begins.

    Raises:
        SeamError, ConfigError.
    """
    from morphserve.errors import ConfigError

    seams.require_all(_device_seams())
    read_settings(engine_args.additional_config)
    for field, ours in (("scheduler_cls", SCHEDULER_CLS), ("worker_extension_cls", WORKER_EXTENSION_CLS)):
        theirs = getattr(engine_args, field)
        if theirs and theirs != ours:
            raise ConfigError(
                f"{field} is already {theirs!r} (another plugin, or --{field.replace('_', '-')}). "
                f"MorphServe needs {ours!r} there: remove one of the two."
            )
        setattr(engine_args, field, ours)
    install_engine_seams()
    _allow_endpoint_plugin()


def _device_seams() -> tuple[seams.Seam, ...]:
    """Return the rows that hold or fall with a GPU."""
    from morphserve.integration.seams import CUDA_SEAMS
    from morphserve.integration.start import is_cuda

    return CUDA_SEAMS if is_cuda() else ()


def _allow_endpoint_plugin() -> None:
    """Name ourselves in VLLM_PLUGINS, which is an allow list for EVERY plugin group.

    Source: vllm/plugins/__init__.py, load_endpoint_plugins. Only adding keeps what worked without us.
    """
    from importlib.metadata import entry_points

    have = os.environ.get("VLLM_PLUGINS")
    if have is None:
        groups = {group for group in entry_points().groups if group.startswith("vllm.")}
        groups.discard("vllm.endpoint_plugins")  # not loaded while VLLM_PLUGINS is unset: keep it so
        names = {e.name for group in groups for e in entry_points(group=group)}
    else:
        names = {name for name in have.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {KEY}))


def _is_cli() -> bool:
    return os.path.basename(sys.argv[0]) == "vllm"


def _exit(message: str) -> None:
    raise SystemExit(f"morphserve: error: {message}")
