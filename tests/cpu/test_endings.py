"""What a server's log says about its end, on excerpts of logs that vLLM wrote; long stacks are cut."""

from __future__ import annotations

import pytest

from morphserve.endings import Problem, cause_in, first_cause, how_it_ended, one_line, sentence

FRONT = """\
Traceback (most recent call last):
  File "/venv/bin/vllm", line 8, in <module>
    sys.exit(main())
             ^^^^^^
  File "/venv/vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked
  warnings.warn('resource_tracker: There appear to be %d '
"""
CORE = """\
(EngineCore pid=6511) ERROR 11-23 14:59:13 [core.py:1510] EngineCore failed to start.
(EngineCore pid=6511) ERROR 11-23 14:59:13 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=6511) ERROR 11-23 14:59:13 [core.py:1510]   File "/venv/vllm/v1/engine/core.py", line 1482, in run
(EngineCore pid=6511) ERROR 11-23 14:59:13 [core.py:1510]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=6511) ERROR 11-23 14:59:13 [core.py:1510] {error}
(Worker pid=6522) INFO 11-23 14:59:13 [multiproc_executor.py:900] Parent process exited, terminating worker queues
(EngineCore pid=6511) ERROR 11-23 14:59:18 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly \
(exit code: 0), shutting down executor.
"""
WORKER = """\
(Worker pid=6522) ERROR 11-23 14:58:33 [multiproc_executor.py:953] WorkerProc failed to start.
(EngineCore pid=6511) INFO 11-23 14:58:33 [core.py:133] Initializing a V1 LLM engine
(Worker pid=6522) ERROR 11-23 14:58:33 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=6522) ERROR 11-23 14:58:33 [multiproc_executor.py:953]   File "/venv/cpu_worker.py", line 84, in __init__
(Worker pid=6522) ERROR 11-23 14:58:33 [multiproc_executor.py:953]     raise ValueError(
(Worker pid=6522) ERROR 11-23 14:58:33 [multiproc_executor.py:953] {error}
"""
INIT_FAILED = (
    "Exception: WorkerProc initialization failed due to an exception in a background process. "
    "See stack trace for root cause."
)
MEMORY = (
    "ValueError: Available memory on node 0 (15.56/17.09 GiB) on startup is less than desired CPU memory "
    "utilization (0.92, 15.72 GiB)."
)


def test_the_worker_names_the_cause_and_the_others_only_repeat_it() -> None:
    """Guards: the user reads that the engine core failed, and the one sentence that says why stands far above."""
    log = WORKER.format(error=MEMORY) + CORE.format(error=INIT_FAILED) + FRONT
    assert cause_in(log) == MEMORY
    assert "VLLM_CPU_KVCACHE_SPACE=1" in sentence(MEMORY, "Log: x")
    assert sentence(MEMORY, "Log: x").endswith("Log: x.")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("morphserve.errors.ConfigError: w9 has no kernel. Leave it out.", "w9 has no kernel. Leave it out."),
        ("quant_layers.errors.KernelError: no kernel can run w4 with torch.bfloat16 here", "no kernel can run w4 with "
         "torch.bfloat16 here"),
        ("AttributeError: 'NoneType' object has no attribute 'x'", "AttributeError: 'NoneType' object has no attribute "
         "'x'"),
    ],
)  # fmt: skip
def test_our_own_error_is_said_without_its_class(error: str, cause: str) -> None:
    """Guards: a ConfigError of a worker is lost among vLLM's, or an AttributeError becomes a bare message."""
    assert cause_in(WORKER.format(error=error) + CORE.format(error=INIT_FAILED) + FRONT) == cause


def test_our_error_counts_before_an_earlier_one_of_vllm() -> None:
    """Guards: of two causes the user is told the one without a remedy."""
    log = WORKER.format(error="RuntimeError: rank 1 went away") + CORE.format(
        error="morphserve.errors.ConfigError: lower kv.base_num_blocks"
    )
    assert cause_in(log) == "lower kv.base_num_blocks"


def test_of_errors_that_led_to_each_other_the_last_is_said() -> None:
    """Guards: the user reads the KeyError of a lookup instead of what was made of it."""
    stack = "Traceback (most recent call last):\n  File 'a'\n"
    joined = "\nThe above exception was the direct cause of the following exception:\n\n"
    log = f"{stack}KeyError: 'x'\n{joined}{stack}ValueError: no name\n{joined}{stack}OSError: no model\n"
    assert cause_in(log) == "OSError: no model"
    assert cause_in(log + FRONT) == "OSError: no model"


def test_an_error_that_ended_nothing_is_not_the_cause() -> None:
    """Guards: a transition that failed an hour ago is named as what killed the worker now."""
    failed = (
        "(Worker pid=6522) ERROR 11-23 13:00:00 [commands.py:65] morphserve: rank 0, plan r1 failed\n"
        "(Worker pid=6522) ERROR 11-23 13:00:00 [commands.py:65] Traceback (most recent call last):\n"
        "(Worker pid=6522) ERROR 11-23 13:00:00 [commands.py:65]   File 'a'\n"
        "(Worker pid=6522) ERROR 11-23 13:00:00 [commands.py:65] quant_layers.errors.StoreError: file is gone\n"
    )
    killed = (
        "(EngineCore pid=6511) ERROR 11-23 14:59:18 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -9), shutting down executor.\n"
    )
    said = cause_in(failed + killed + CORE.format(error="RuntimeError: cancelled"))
    assert said is not None and said.startswith("vLLM's process VllmWorker-0 was killed (SIGKILL)")
    assert "Free some memory" in sentence(said)
    assert cause_in(failed + "(Worker pid=6522) INFO 11-23 13:00:01 [x.py:1] all is well\n") is None


def test_a_worker_that_fails_in_the_run_is_quoted() -> None:
    """Guards: of an error in a step the user reads that a stack trace is above."""
    log = CORE.replace("failed to start", "encountered a fatal error").format(
        error="RuntimeError: Worker failed with error 'no room for 3 blocks', please check the stack trace above for "
        "the root cause"
    )
    assert cause_in(log) == "RuntimeError: no room for 3 blocks"


def test_a_core_that_vanished_was_killed() -> None:
    """Guards: of an engine core that the system killed the user reads `EngineDeadError`, or nothing."""
    for log in (
        FRONT.replace("{}", "{'EngineCore': -9}"),
        "(APIServer pid=1) WARNING 11-23 [core_client.py:818] [shutdown] MPClient: engine core exited unexpectedly\n",
    ):
        assert "was killed (SIGKILL)" in (cause_in(log) or "")
    assert cause_in(FRONT.replace("{}", "{'EngineCore': 1}")) is None


def test_our_last_line_is_taken_as_it_is() -> None:
    """Guards: a YAML with three problems, which has no stack at all, is reported by its last line only."""
    log = (
        "(APIServer pid=5436) WARNING 11-23 14:53:02 [system_utils.py:255] Found ulimit of 20000\n"
        "morphserve: error: /tmp/bad.yaml: 1 problem(s):\n  policy: Input tag 'nonsense' does not match\n"
        "Every key and its bounds: `morphserve init` writes them.\n"
    )
    assert cause_in(log) == (
        "/tmp/bad.yaml: 1 problem(s): policy: Input tag 'nonsense' does not match. Every key and its bounds: "
        "`morphserve init` writes them."
    )


def test_usage_errors_and_pydantic_are_put_into_words() -> None:
    """Guards: three lines of usage, or a link to pydantic's website, in place of what is wrong."""
    assert cause_in("usage: vllm [-h]\nvllm: error: unrecognized arguments: --no-such-flag\n") == (
        "unrecognized arguments: --no-such-flag"
    )
    said = (
        "1 validation error for ModelConfig\n  Value error, Invalid repository ID or local directory specified: '/no' "
        "[type=value_error, input_value=ArgsKwargs(())]\n    For further information visit https://x.dev/v/value_error"
    )
    assert one_line(said) == "Invalid repository ID or local directory specified: '/no'"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (137, "killed (SIGKILL)"),
        (-9, "killed (SIGKILL)"),
        (-4, "SIGILL"),
        (-11, "ended by SIGSEGV"),
        (3, "ended with code 3"),
        (None, "does not answer"),
    ],
)
def test_an_exit_status_in_words(code: int | None, words: str) -> None:
    """Guards: 'code -9', which tells nobody that memory ran out."""
    assert words in how_it_ended(code)


def test_what_the_user_asked_for_is_no_cause() -> None:
    """Guards: Ctrl-C during the start ends with a line that speaks of an error."""
    stopped = Problem("", "Worker proc VllmWorker-0 died unexpectedly (exit code: -15), shutting down executor.")
    assert first_cause([Problem("KeyboardInterrupt", ""), Problem("RuntimeError", "cancelled"), stopped]) is None
    assert first_cause([Problem("MemoryError", "")]) == "MemoryError"


def test_a_killed_worker_without_a_code_is_the_cause() -> None:
    """Guards: the core's word that its executor failed is taken, since nobody had buried the worker yet."""
    died = Problem("", "Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.")
    for problems in (
        [died, Problem("RuntimeError", "Executor failed.")],
        [Problem("RuntimeError", "Executor failed."), died],
    ):
        cause = first_cause(problems)
        assert cause is not None and cause.startswith("vLLM's process VllmWorker-0 died and left no word")
        assert "Free some memory" in sentence(cause)


def test_a_remedy_is_said_once() -> None:
    """Guards: the last line of a server, which holds the remedy, is repeated with another one behind it."""
    once = sentence("OSError: [Errno 98] Address already in use")
    assert once.count("--port") == 1 and sentence(once) == once
