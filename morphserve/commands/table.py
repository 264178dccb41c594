"""Every command, a row each. A new one is a module with `main(argv, prog) -> exit status`, and a row here.

The module's docstring is its --help: the question it answers, its columns, an example. It is loaded when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One word after `morphserve`."""

    name: str
    module: str  # below `morphserve`
    help: str
    extra: str = ""  # of pyproject.toml: what the module imports that `pip install morphserve` leaves out

    @property
    def prog(self) -> str:
        """What its own --help and its messages call it."""
        return f"morphserve {self.name}"


COMMANDS = (
    Command("demo", "commands.demo", "stock vLLM, then MorphServe, on a burst fitted to this machine", "replay"),
    Command("check", "commands.check", "can MorphServe run here, in which dtype and formats"),
    Command("init", "commands.init", "write a config with every key and its default"),
    Command("prepare", "tools.prepare.cli", "measure a model once, kept where its servers find it", "profile"),
    Command("calibrate", "tools.profile.calibrate", "how long a step takes here, at every level", "replay"),
    Command("profile", "tools.profile.cli", "which layers to swap first, and what each level costs", "profile"),
    Command("quantize", "tools.quantize.cli", "make a 4-bit checkpoint, with AWQ or GPTQ"),
    Command("measure-kl", "tools.profile.measure", "what a format costs, in the kernels that serve", "profile"),
    Command("replay", "tools.bench.cli", "replay traffic against servers, and compare them", "replay"),
    Command("served-kl", "tools.quality.cli", "what quality a replay's answers were served at", "profile"),
    Command("simulate", "commands.simulate", "the same in virtual time, without servers", "replay"),
    Command("sweep", "tools.bench.sweep.cli", "several policies on several windows", "replay"),
    Command("tune", "tools.tune.cli", "find the policy for one's own traffic, simulated", "tune"),
    Command("inspect", "tools.profile.inspect", "what is in a profile"),
    Command("status", "tools.watch.status", "how a running server fares: level, blocks, late requests"),
    Command("watch", "tools.watch.watch", "the same, live, until Ctrl-C", "ops"),
    Command("pin", "tools.admin.pin", "hold a running server at a level, or no deeper, for so long"),
    Command("restore", "tools.admin.restore", "bring it back to level 0 now"),
    Command("pause", "tools.admin.pause", "let it stay at the level that it has"),
    Command("drain", "tools.admin.drain", "let nobody in, and empty it before maintenance"),
    Command("resume", "tools.admin.resume", "end what was ordered: its policy decides again"),
    Command("replay-log", "commands.replay_log", "ask a policy again what a decision log says it was asked"),
    Command("soak", "tools.soak.cli", "hours of morphing beside stock: does anything add up", "replay"),
    Command("chaos", "tools.chaos.cli", "break things beside a loaded server: does every answer still come", "replay"),
    Command("gpu-check", "tools.gpucheck.cli", "what of the NVIDIA path holds on this machine", "cuda"),
)
