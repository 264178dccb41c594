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
from morphserve.integration.start import CONFIG_FILE, KEY, check_frontend, ignore_hangups, is_active, read_settings
from morphserve.user_input import user_path

logger = logging.getLogger("vllm.morphserve")

SCHEDULER_CLS = "morphserve.integration.engine.scheduler.make_scheduler"
WORKER_EXTENSION_CLS = "morphserve.integration.worker.worker.MorphServeWorker"
_ALLOW_LIST = "VLLM_PLUGINS"
_VLLM_GROWTH = "enable_extensible_kv_cache"  # of EngineArgs; None = on where it can be


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
        if is_active(getattr(args, "additional_config", None)):
            _check_frontend(args)
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


def _check_frontend(args: argparse.Namespace) -> None:
    try:
        check_frontend(args)
    except MorphServeError as e:
        _exit(str(e))


def _create_engine_config(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not is_active(self.additional_config):
            return original(self, usage_context, *args, **kwargs)
        try:
            ending.arm(_is_cli())
            _activate(self)
            config = original(self, usage_context, *args, **kwargs)
            from morphserve.integration.start import attach_prepared, check_engine

            attach_prepared(config)
            check_engine(config)
            _trace(config)
            if _is_of_server(usage_context):
                ignore_hangups()
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
    from morphserve.integration.server import forget_forged_marks, keep_all_receipts

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
    _keep_kv_from_growing(engine_args)
    install_engine_seams()
    seams.wrap(seams.ENDPOINT_PLUGINS, _load_endpoint_plugins)
    seams.wrap(seams.CHOICE_OUTPUT, keep_all_receipts)
    seams.wrap(seams.CLIENT_GENERATE, forget_forged_marks)


def _keep_kv_from_growing(engine_args: Any) -> None:
    """Turn vLLM's own growth of the KV cache off, where the installed version has it: two would map the same blocks.

    No supported version does. Where it comes, it is on unless it is turned off (vLLM's pull request 56492).

    Raises:
        ConfigError: the user asks for it.
    """
    from morphserve.errors import ConfigError

    asked = getattr(engine_args, _VLLM_GROWTH, False)
    if asked:
        raise ConfigError(
            f"{_VLLM_GROWTH} is {asked}: vLLM and MorphServe would both map blocks behind the KV cache, only one can. "
            "Leave out --enable-extensible-kv-cache."
        )
    if asked is None:
        setattr(engine_args, _VLLM_GROWTH, False)


def _device_seams() -> tuple[seams.Seam, ...]:
    """Return the rows that hold or fall with a GPU."""
    from morphserve.integration.seams import CUDA_SEAMS
    from morphserve.integration.start import is_cuda

    return CUDA_SEAMS if is_cuda() else ()


def _load_endpoint_plugins(original: Callable[..., Any]) -> Any:
    """Have vLLM load our endpoint beside those that the user allows.

    vLLM loads an endpoint only if VLLM_PLUGINS names it. That is an allow list for EVERY plugin group, and some plugins
    take their name in it as leave to download. So ours stands in it only while vLLM loads endpoints, and no other does.
    """

    @functools.wraps(original)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> Any:
        before = os.environ.get(_ALLOW_LIST)
        names = [] if before is None else before.split(",")
        os.environ[_ALLOW_LIST] = ",".join([*names, *({KEY} - set(names))])
        try:
            return original(*args, **kwargs)
        finally:
            if before is None:
                del os.environ[_ALLOW_LIST]
            else:
                os.environ[_ALLOW_LIST] = before

    return load_endpoint_plugins


def _trace(config: Any) -> None:
    from morphserve.integration import spans

    if spans.is_traced(config):
        spans.install()


def _is_of_server(usage_context: Any) -> bool:
    from vllm.usage.usage_lib import UsageContext

    return usage_context is UsageContext.OPENAI_API_SERVER


def _is_cli() -> bool:
    return os.path.basename(sys.argv[0]) == "vllm"


def _exit(message: str) -> None:
    raise SystemExit(f"morphserve: error: {message}")
