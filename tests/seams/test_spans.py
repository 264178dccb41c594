"""Levels in vLLM's own traces: its scheduler, output processor, tracer and exporter, and a collector that listens."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.util._once import Once
from otlp import PROTOCOL, Collector
from seams import async_world
from seams.async_world import World
from seams.logged import records_of
from seams.test_async_scheduler import model as model  # noqa: F401  a fixture
from vllm import SamplingParams, tracing
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from morphserve import plugin
from morphserve.integration import seams, spans, spared
from morphserve.integration.spared import Spared

pytestmark = pytest.mark.seams

PROMPT = [1, 2, 3, 4, 5]
COSTS = {"w8": 0.02, "w4": 0.5}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OF_THE_START = "11112222333344445555666677778888"  # the trace of a server's start, where vLLM has put it
_OURS = (seams.REQUEST_SPAN, seams.REQUEST_SPAN_MAKER)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves the trace of its start in the environment; what has no other parent is a child of that."""
    monkeypatch.setenv("traceparent", f"00-{OF_THE_START}-{PARENT}-01")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """vLLM traces to it, as after `--otlp-traces-endpoint`; all is undone at the end."""
    listening = Collector()
    monkeypatch.setenv(*PROTOCOL)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", listening.url)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    tracing.init_tracer("vllm.llm_engine", listening.url)
    make_config = async_world.make_config

    def traced(directory: Path) -> Any:
        config = make_config(directory)
        config.observability_config.otlp_traces_endpoint = listening.url
        plugin._trace(config)
        return config

    monkeypatch.setattr(async_world, "make_config", traced)
    yield listening
    provider: Any = trace.get_tracer_provider()
    provider.shutdown()
    atexit.unregister(provider.shutdown)
    listening.close()
    for patch in seams.patches():
        if patch.row in _OURS:
            patch.undo()


def sent(collector: Collector, name: str) -> list[tuple[Any, dict[str, Any]]]:
    """The spans of this name, once all that were made have been sent."""
    provider: Any = trace.get_tracer_provider()
    provider.force_flush()
    return collector.spans(name)


class Counting(World):
    """Notes the level that each token was sampled at."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.sampled: dict[str, list[int]] = {}
        self._levels: dict[int, int] = {}
        super().__init__(*args, **settings)

    def check(self, output: Any) -> None:
        super().check(output)
        self._levels[id(output)] = self.morph.controller.effective_level

    def on_output(self, step: Any, output: Any) -> None:
        self.sampled.setdefault(output.request_id, []).extend([self._levels[id(step)]] * len(output.new_token_ids))


def priced(model: Path) -> Counting:  # noqa: F811
    steps = [{"format": fmt, "layers_per_level": 6} for fmt in COSTS]
    return Counting(model, 1, ladder={"steps": steps, "expected_kl": COSTS})


class Front:
    """The API server's side of vLLM, behind the wire."""

    def __init__(self) -> None:
        self._processor = OutputProcessor(None, log_stats=True, tracing_enabled=True)
        self.answers: dict[str, Any] = {}

    def expect(self, name: str, num_tokens: int) -> None:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        request = EngineCoreRequest(name, PROMPT, None, params, None, 1e9, None, None, None, external_req_id=name)
        self._processor.add_request(request, None)

    def take(self, outputs: list[Any]) -> None:
        for each in outputs:
            wire = MsgpackEncoder().encode(EngineCoreOutputs(outputs=[each]))
            (output,) = MsgpackDecoder(EngineCoreOutputs).decode(wire).outputs
            for answer in self._processor.process_outputs([output], 1.0, IterationStats()).request_outputs:
                self.answers[answer.request_id] = answer


def served(world: World, front: Front, name: str, num_tokens: int, level: int = 0, **asked: Any) -> None:
    """Serve a request to its end, at `level` from its fourth token on."""
    front.expect(name, num_tokens)
    world.add(name, PROMPT, num_tokens, **asked)
    done = len(world.outputs)
    while world.scheduler.has_unfinished_requests():
        if len(world.tokens[name]) >= 3:
            world.policy.level = level
        world.step()
    world.run_dry()
    front.take([output for output in world.outputs[done:] if output.request_id == name])


def test_the_span_of_a_request_tells_its_levels(model: Path, collector: Collector) -> None:  # noqa: F811
    """Guards: spans without levels, with the server's level at the end, or with those of another request; levels that
    clients find in an answer that did not ask for them."""
    world, front = priced(model), Front()
    served(world, front, "whole", 6)
    served(world, front, "degraded", 30, level=1)
    served(world, front, "asked", 6, level=1, morphserve_receipt=1)
    found = {attributes["gen_ai.request.id"]: attributes for _, attributes in sent(collector, "llm_request")}
    ours = {name: {k: v for k, v in row.items() if k.startswith("morphserve.")} for name, row in found.items()}
    assert ours["whole"] == {
        "morphserve.level.min": 0,
        "morphserve.level.max": 0,
        "morphserve.level.deepest": 0,
        "morphserve.degraded_share": 0.0,
        "morphserve.expected_kl": 0.0,
    }
    share = sum(level > 0 for level in world.sampled["degraded"]) / 30
    assert 0 < share < 1 and len(world.sampled["degraded"]) == 30
    degraded = ours["degraded"]
    assert (degraded["morphserve.level.min"], degraded["morphserve.level.max"]) == (0, 1)
    assert degraded["morphserve.degraded_share"] == pytest.approx(share)
    assert degraded["morphserve.expected_kl"] == pytest.approx(share * COSTS["w8"])
    assert ours["asked"]["morphserve.level.min"] == 1 and ours["asked"]["morphserve.degraded_share"] == 1.0
    assert all("gen_ai.latency.e2e" in row for row in found.values()), "vLLM's own are gone"
    assert [front.answers[name].kv_transfer_params for name in ("whole", "degraded")] == [None, None]
    assert front.answers["asked"].kv_transfer_params["morphserve"]["output_tokens"] == {"1": 6}
    assert not world.morph.receipts._drafts and not world.morph.receipts._begun


@pytest.mark.usefixtures("started")
def test_a_clients_trace_goes_on(model: Path, collector: Collector) -> None:  # noqa: F811
    """Guards: levels that take the place of the client's trace context, or that make vLLM believe there is one."""
    world, front = priced(model), Front()
    for name, headers in (("with", {"traceparent": f"00-{TRACE}-{PARENT}-01"}), ("without", None)):
        front.expect(name, 3)
        world.add(name, PROMPT, 3)
        world.scheduler.requests[name].trace_headers = headers
        world.run_dry()
        front.take([output for output in world.outputs if output.request_id == name])
    found = {attributes["gen_ai.request.id"]: (span, attributes) for span, attributes in sent(collector, "llm_request")}
    assert found["with"][0].trace_id.hex() == TRACE and found["with"][0].parent_span_id.hex() == PARENT
    assert found["without"][0].trace_id.hex() == OF_THE_START
    assert all(row["morphserve.level.max"] == 0 for _, row in found.values())


@pytest.mark.parametrize("headers", [None, {}, {"morphserve": "no JSON"}, {"morphserve": "[1]"}, {"morphserve": "7"}])
def test_an_output_without_levels_has_vllms_span(headers: dict[str, str] | None, collector: Collector) -> None:
    """Guards: an engine without MorphServe in the same process, or somebody's own header, that ends the output loop."""
    spans.install()
    spans.install()
    front = Front()
    front.expect("a", 2)
    front.take([EngineCoreOutput("a", [1, 2], finish_reason=1, trace_headers=headers)])
    ((_, attributes),) = sent(collector, "llm_request")
    assert not [key for key in attributes if key.startswith("morphserve")]


@pytest.mark.parametrize("part", ["_take_levels", "_of_request"])
def test_an_error_of_ours_costs_levels_and_no_span(
    part: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: one error in the task that makes everybody's outputs, which vLLM ends, and with it all requests."""
    lines: list[str] = []
    monkeypatch.setattr(spans, "_spared", Spared("the levels"))
    monkeypatch.setattr(spared.logger, "warning", lambda text, *args, **more: lines.append(text % args))

    class Failing:
        """The function that takes levels, or the variable that they wait in."""

        set, reset = spans._of_request.set, spans._of_request.reset

        def __call__(self, output: Any) -> Any:
            raise RuntimeError("an error of ours")

        get = __call__

    monkeypatch.setattr(spans, part, Failing())
    spans.install()
    front = Front()
    for name in ("a", "b"):
        front.expect(name, 2)
        front.take([EngineCoreOutput(name, [1, 2], finish_reason=1, trace_headers={"morphserve": "{}"})])
    assert len(sent(collector, "llm_request")) == 2 and len(lines) == 1


@pytest.mark.usefixtures("started")
def test_each_transition_is_a_span(model: Path, collector: Collector) -> None:  # noqa: F811
    """Guards: transitions that no trace shows; spans that are children of the server's start, or of a request."""
    world, front = priced(model), Front()
    served(world, front, "a", 30, level=2)
    world.policy.level = 0
    for _ in range(40):
        world.step()
    row = world.morph.controller.status()["recent_transitions"][-1]
    first, second = sent(collector, "morphserve.transition")
    span, attributes = first
    assert attributes["morphserve.direction"] == "degrade" and attributes["morphserve.outcome"] == "committed"
    assert (attributes["morphserve.from_level"], attributes["morphserve.to_level"]) == (0, row["to_level"])
    assert attributes["morphserve.kv_blocks_after"] == row["kv_blocks_after"] and "morphserve.error" not in attributes
    assert attributes["morphserve.engine"] == 0 and attributes["morphserve.reason"] == row["reason"]
    took_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert took_s == pytest.approx(row["seconds"], abs=1e-4)
    assert second[1]["morphserve.direction"] == "restore"
    assert not span.parent_span_id and span.trace_id != second[0].trace_id


def test_a_span_that_fails_is_said_once_and_stops_nothing(
    model: Path,  # noqa: F811
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Guards: an error of the tracer's that ends morphing, or is met again at every transition."""

    def broken(**kwargs: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(tracing, "instrument_manual", broken)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    world, front = priced(model), Front()
    served(world, front, "a", 30, level=2)
    world.policy.level = 0
    for _ in range(40):
        world.step()
    assert world.morph.controller.level == 0 and not world.morph.controller.failed
    warnings = [record.getMessage() for record in records_of(caplog) if record.levelno >= logging.WARNING]
    said = [text for text in warnings if text.startswith("morph")]
    assert said == ["morphserve: a transition's span failed, no further ones are made"]


def test_without_a_trace_nothing_is_looked_at(model: Path) -> None:  # noqa: F811
    """Guards: a draft for each request, a header with each answer, or a wrapper, where nobody traces."""
    plugin._trace(async_world.make_config(model))
    assert not [patch for patch in seams.patches() if patch.row in _OURS]
    world = priced(model)
    world.add("a", PROMPT, 4)
    world.step()
    assert not world.morph.receipts._drafts and world.morph.controller.history.on_end is None
    world.run_dry()
    assert [output.trace_headers for output in world.outputs] == [None] * len(world.outputs)


def test_levels_without_a_price_have_none() -> None:
    """Guards: a cost that is a mean over those tokens alone whose level has one."""
    told = spans.levels_as_text((0.0, None), {0: 1, 1: 3}, 1)
    assert "expected_kl" not in told and '"morphserve.degraded_share": 0.75' in told
    assert spans.levels_as_text((0.0, None), {}, 1) == '{"morphserve.level.deepest": 1}'
