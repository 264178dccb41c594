"""Why a server ended, in one line: out of its log, or out of the exceptions that its processes met.

vLLM runs in several processes, and each that meets the end prints a stack; the one that the others fell
over is rarely the last. What is said here is the first cause and what to do about it. Standard library only.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PREFIX = "morphserve: error: "  # before the line that ends a command of ours

_OURS = ("morphserve.", "quant_layers.", "kv_resize.", "policies.")  # modules of exception classes
_MAX_CHARS = 1200
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# "(EngineCore pid=12) ERROR 11-23 14:55:01 [core.py:1510] text"; each line of a stack has that before it.
_RECORD = re.compile(r"\((?P<process>\w[\w-]* pid=\d+)\) ERROR \d\d-\d\d [\d:]{8} (?P<place>\[[^\]]*\]) ?(?P<text>.*)")
_FATAL = re.compile(r"WorkerProc failed|EngineCore failed to start|EngineCore encountered a fatal error")
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<said>.*))?")
_NEXT = re.compile(r"\(\w[\w-]* pid=\d+\)|\[|/\S+:\d+: |Traceback|The above exception|During handling|sys:\d")
_USAGE = re.compile(r"vllm[\w ]*: error: (.*)")
# Of one process about another: true, and of no use to whoever must repair it.
_HEARSAY = re.compile(
    r"[Ss]ee (?:the )?(?:stack trace|root cause)|^cancelled$|Engine core initialization failed|^Executor failed\.$"
)
_QUOTING = re.compile(r"Worker failed with error '(?P<said>.*)', please check", re.DOTALL)
# Nobody knows the code of a process whose pipe is closed and that the system has not buried yet.
_DIED = re.compile(r"[Pp]roc (?P<name>\S+) died unexpectedly \(exit code: (?P<code>-?\d+|None)\)")
_FAILED_CORE = re.compile(r"Failed core proc\(s\): \{'(?P<name>[^']+)': (?P<code>-?\d+)")
_SHORT_OF_MEMORY = "as a rule by a system that is short of memory"
_CORE_GONE = "engine core exited unexpectedly"
_ASKED_FOR = (0, -signal.SIGTERM, -signal.SIGINT)
_ENDED_BY_USER = ("KeyboardInterrupt", "SystemExit", "CancelledError")

_REMEDIES = (
    (r"Available memory on node .* on startup",
     "Set VLLM_CPU_KVCACHE_SPACE=1 (GiB): with a size given, vLLM asks for no share of the machine."),
    (r"on kv cache allocation is less than requested", "Lower VLLM_CPU_KVCACHE_SPACE or --kv-cache-memory-bytes."),
    (r"KV cache is needed|[Nn]o available memory for the cache blocks",
     "Raise VLLM_CPU_KVCACHE_SPACE or --kv-cache-memory-bytes, or lower --max-model-len."),
    (r"Address already in use", "Stop what listens there, or take another port with --port."),
    (r"Invalid repository ID|Repo id must be|not a valid model identifier|couldn't connect to|Can't load",
     "Give the directory of a model, or a model that can be reached."),
    (r"No space left on device", "Free some disk space."),
    (r"[Cc](?:annot|an't) allocate memory|MemoryError|out of memory|short of memory",
     "Free some memory, or serve with less: fewer blocks, a smaller model."),
    (r"unrecognized arguments|invalid choice|expected one argument", "Correct the command line."),
    (r"does not have \(SIGILL\)", "Run `morphserve check`."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """The end of a process: an exception, or (without a kind) what somebody else saw of it."""

    kind: str  # class, with its module unless that is builtins
    said: str

    @property
    def is_ours(self) -> bool:
        return self.kind.startswith(_OURS)


def first_cause(problems: Iterable[Problem]) -> str | None:
    """Say why the server ended, of problems in the order in which processes met them; None if none says.

    One of ours counts before those of vLLM, whenever it came: it knows the remedy.
    """
    real = [found for problem in problems if (found := _behind(problem)) is not None]
    best = next((problem for problem in real if problem.is_ours), next(iter(real), None))
    if best is None:
        return None
    said = one_line(best.said)
    return said if said and (best.is_ours or not best.kind) else f"{best.kind}: {said}".removesuffix(": ")


def cause_in(log: str) -> str | None:
    """Say why the server that wrote this log ended; None if the log does not say.

    Args:
        log: stdout and stderr of all of its processes, mixed as they came.
    """
    lines = [_COLOUR.sub("", line.rstrip()) for line in log.splitlines()]
    own = [index for index, line in enumerate(lines) if line.startswith(PREFIX)]
    if own:
        return one_line("\n".join(_message(lines, own[-1], lines[own[-1]].removeprefix(PREFIX))))
    problems = [*_logged(lines), *_raised(lines), *(Problem("", line) for line in lines if _CORE_GONE in line)]
    if (cause := first_cause(problems)) is not None:
        return cause
    return next((match[1] for line in reversed(lines) if (match := _USAGE.match(line))), None)


def how_it_ended(code: int | None, name: str = "the server") -> str:
    """Put an exit status into words; negative or above 128 is the number of a signal, None is that nobody knows."""
    if code is None:
        return f"{name} does not answer"
    number = -code if code < 0 else max(code - 128, 0)
    if number == signal.SIGKILL:
        return f"{name} was killed (SIGKILL), {_SHORT_OF_MEMORY}"
    if number == signal.SIGILL:
        return f"{name} met an instruction that this processor does not have (SIGILL)"
    if number in signal.valid_signals():
        return f"{name} was ended by {signal.Signals(number).name}"
    return f"{name} ended with code {code}"


def sentence(cause: str, *more: str) -> str:
    """Join cause, remedy where one is known and not said, and what else is to be said, in one line."""
    cause = one_line(cause)
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, cause)), "")
    parts = [cause, *((remedy,) if remedy and remedy not in cause else ()), *more]
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part)


def one_line(text: str) -> str:
    """Strip line ends and what pydantic adds for developers, and limit the length."""
    text = re.sub(r"\s*For further information visit \S+", "", text)
    text = re.sub(r"(?s)^\d+ validation errors? for \w+\s+Value error, (.*?) \[type=.*", r"\1", text)
    text = re.sub(r"(?<=[\w)\]'\"])[ \t]*\n\s*(?=[A-Z])", ". ", text.strip())
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ..."


def _behind(problem: Problem) -> Problem | None:
    """Return what a problem tells at second hand; None if it only points elsewhere or somebody wanted it."""
    if problem.kind.rpartition(".")[2] in _ENDED_BY_USER:
        return None
    if match := _QUOTING.search(problem.said):
        return Problem(problem.kind, match["said"])
    if match := _DIED.search(problem.said) or _FAILED_CORE.search(problem.said):
        if match["code"] == "None":
            return Problem("", f"vLLM's process {match['name']} died and left no word, {_SHORT_OF_MEMORY}")
        code = int(match["code"])
        seen = code not in _ASKED_FOR and (code < 0 or match.re is _DIED)  # a core that raised ends with code 1
        return Problem("", how_it_ended(code, f"vLLM's process {match['name']}")) if seen else None
    if _CORE_GONE in problem.said:
        return Problem("", how_it_ended(-signal.SIGKILL, "vLLM's engine core"))  # else it had said why
    return None if _HEARSAY.search(problem.said) or "died unexpectedly" in problem.said else problem


def _logged(lines: Sequence[str]) -> list[Problem]:
    """Read the records with which processes of vLLM say that they end, in the order of their first lines."""
    records: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if match := _RECORD.match(line):
            records.setdefault((match["process"], match["place"]), []).append(match["text"])
    found: list[Problem] = []
    for texts in records.values():
        if _FATAL.match(texts[0]) or _DIED.search(texts[0]):
            found += _raised(texts) or [Problem("", texts[0])]
    return found


def _raised(lines: Sequence[str]) -> list[Problem]:
    """Read the stacks in some lines; of those that one exception led to another, the last one first."""
    found: list[Problem] = []
    chained, before = False, 0
    for index, line in enumerate(lines):
        if line.startswith(("The above exception", "During handling")):
            chained = True
        if line != _TRACEBACK:
            continue
        end = next((i for i in range(index + 1, len(lines)) if not lines[i].startswith(" ")), None)
        match = _EXCEPTION.fullmatch(lines[end]) if end is not None else None
        if end is None or match is None:
            continue
        before = before if chained else len(found)
        found.insert(before, Problem(match["kind"], "\n".join(_message(lines, end, match["said"] or ""))))
        chained = False
    return found


def _message(lines: Sequence[str], start: int, first: str) -> list[str]:
    """Read a message of one or several lines: up to an empty one, or one that somebody else begins."""
    found = [first]
    for line in lines[start + 1 :]:
        if not line or _NEXT.match(line):
            break
        found.append(line)
    return found
