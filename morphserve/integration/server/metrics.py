"""The `morphserve:*` metrics on vLLM's own /metrics, and the plugin that adds our routes.

The engine cores are asked twice a second (`poll.py`); scrapes and questions read the last answers. Each data-parallel
replica is an engine of its own, told by its index. vLLM's own cache_config_info label is fixed at start and goes stale
after a resize: `morphserve:kv_blocks` is the one to watch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product
from operator import itemgetter
from typing import TYPE_CHECKING, Any, get_args

from fastapi import APIRouter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from morphserve.config import MorphServeConfig
from morphserve.control import Direction, ErrorPlace, Outcome
from morphserve.integration import seams
from morphserve.integration.server.floor_door import FloorDoor
from morphserve.integration.server.poll import SILENT_AFTER_S, StatusPoll
from morphserve.integration.server.queue_limit import QueueLimit
from morphserve.integration.server.receipt_door import ReceiptDoor, note_receipts
from morphserve.integration.server.routes import (
    Access,
    LastStatuses,
    Sameness,
    Shortcut,
    add_admin,
    add_page,
    add_reload,
    add_status,
    on_hangup,
    reload_engines,
)
from morphserve.integration.server.scrape import PREFIX, Refusals, add_behind_shared, add_to_own
from morphserve.integration.server.spare_time import SpareTime
from morphserve.integration.server.tasks import Tasks
from morphserve.integration.start import settings_of
from policies import OrderKind, Predictions

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient

_POLICY_KINDS = ("static", "threshold", "slo")


_Status = dict[str, Any]
_Row = tuple[tuple[str, ...], float]  # values of the labels beside `engine`, value


class StatusCollector(Collector):
    """Turns the last statuses into metric families, every sample with the index of its engine.

    Of engines that are silent nothing is left but since when, so that the last values of one that hangs look like none.
    """

    def __init__(self, poll: StatusPoll) -> None:
        self._poll = poll

    def collect(self) -> Iterator[Metric]:
        statuses, ages_s = self._poll.statuses, self._poll.ages_s
        if ages_s:
            doc = f"Since the engine last answered; beyond {SILENT_AFTER_S:.0f} s it has no other morphserve metric."
            age = GaugeMetricFamily(PREFIX + "status_age_seconds", doc, labels=["engine"])
            for engine, age_s in ages_s.items():
                age.add_metric([engine], age_s)
            yield age
        if not statuses:
            return
        for kind, name, doc, labels, rows_of in _FAMILIES:
            family = kind(PREFIX + name, doc, labels=[*labels, "engine"])
            for status in statuses:
                for values, value in rows_of(status):
                    family.add_metric([*values, str(status["engine"])], value)
            yield family
        yield self._times(statuses)

    def describe(self) -> Iterator[Metric]:
        """Return nothing: it is not known before the first poll. Without this the registry would call collect()."""
        return iter(())

    def _times(self, statuses: list[_Status]) -> Metric:
        doc = "Time of monitor, policy and controller in one engine step."
        family = HistogramMetricFamily(PREFIX + "controller_seconds", doc, labels=["engine"])
        for status in statuses:
            times = status["controller_time"]
            edges = [*(f"{edge:g}" for edge in times["edges_s"]), "+Inf"]
            buckets = list(zip(edges, accumulate(times["counts"]), strict=True))
            family.add_metric([str(status["engine"])], buckets, sum_value=times["sum_s"])
        return family


def _one(key: str) -> Callable[[_Status], list[_Row]]:
    return lambda s: [((), s[key])]


def _by(key: str) -> Callable[[_Status], list[_Row]]:
    return lambda s: [((name,), value) for name, value in s[key].items()]


def _blocks(s: _Status) -> list[_Row]:
    keys = {"published": "num_kv_blocks", "backed": "mapped_kv_blocks", "used": "used_kv_blocks"}
    return [((state,), s[key]) for state, key in keys.items()]


def _longest_pause(s: _Status) -> list[_Row]:
    longest = s["pause_ms"]["max"]
    return [] if longest is None else [((), longest)]


def _transitions(s: _Status) -> list[_Row]:
    every = product(get_args(Direction), get_args(Outcome))
    return [(labels, s["transitions"].get("_".join(labels), 0)) for labels in every]


def _errors(s: _Status) -> list[_Row]:
    return [((place,), s["errors"].get(place, 0)) for place in get_args(ErrorPlace)]


def _late(s: _Status) -> list[_Row]:
    late = s["late"]
    ttft, tpot = late["num_late_ttft"], late["num_late_tpot"]
    both = ttft + tpot - late["num_late"]  # so that the sum over limits is requests
    return [(("ttft",), ttft - both), (("tpot",), tpot - both), (("both",), both)]


def _policy(s: _Status) -> list[_Row]:
    return [((kind,), float(s["policy"]["kind"] == kind)) for kind in _POLICY_KINDS]


def _predictions(s: _Status) -> list[_Row]:
    return [((state,), float(s["predictions"] == state)) for state in get_args(Predictions)]


def _order(s: _Status) -> list[_Row]:
    order = s["orders"]["order"]
    return [((kind,), float(order is not None and order["kind"] == kind)) for kind in get_args(OrderKind)]


def _orders(s: _Status) -> list[_Row]:
    return [(tuple(key.split("_", 1)), count) for key, count in s["counters"]["orders"].items()]


def _reloads(s: _Status) -> list[_Row]:
    return [(("ok",), s["policy"]["reloads"]), (("refused",), s["policy"]["refused"])]


_FAMILIES: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, tuple[str, ...], Any], ...] = (
    (
        GaugeMetricFamily,
        "level",
        "Morph level that tokens count for; 0 = full precision.",
        (),
        _one("exposure_level"),
    ),
    (GaugeMetricFamily, "target_level", "Level the transition in progress heads for.", (), _one("target_level")),
    (GaugeMetricFamily, "kv_blocks", "KV blocks per rank, null block included.", ("state",), _blocks),
    (GaugeMetricFamily, "layers", "Decoder layers by format.", ("format",), _by("layers_by_format")),
    (GaugeMetricFamily, "memory_bytes", "Ledger of the rank with the least left.", ("account",), _by("ledger")),
    (
        GaugeMetricFamily,
        "pause_ms_max",
        "Longest time a command kept a rank from its next step.",
        (),
        _longest_pause,
    ),
    (
        GaugeMetricFamily,
        "failed",
        "1 when MorphServe gave up and the server goes on without it.",
        (),
        lambda s: [((), float(bool(s["failed"])))],
    ),
    (
        GaugeMetricFamily,
        "predictions",
        "1 for what kind slo predicts from; while learning, distrusted or unkeepable, thresholds decide.",
        ("state",),
        _predictions,
    ),
    (
        CounterMetricFamily,
        "transitions",
        "Transitions by direction and outcome.",
        ("direction", "outcome"),
        _transitions,
    ),
    (CounterMetricFamily, "tokens", "Generated tokens by morph level.", ("level",), _by("tokens_by_level")),
    (
        CounterMetricFamily,
        "requests_judged",
        "Requests that have ended and had a limit, their own or the policy's.",
        (),
        lambda s: [((), s["late"]["num_judged"])],
    ),
    (CounterMetricFamily, "requests_late", "Those of them that were late, by the limit they broke.", ("limit",), _late),
    (
        CounterMetricFamily,
        "requests_held",
        "How often a request had to wait for the level that it has asked not to be served below.",
        (),
        _one("num_held_total"),
    ),
    (GaugeMetricFamily, "num_requests_held", "Requests that wait for such a level now.", (), _one("num_held")),
    (CounterMetricFamily, "transition_seconds", "Time spent in transitions.", (), _one("transition_seconds")),
    (GaugeMetricFamily, "policy", "1 for the kind of policy that decides.", ("kind",), _policy),
    (CounterMetricFamily, "policy_reloads", "Policies taken from an edited file.", ("outcome",), _reloads),
    (GaugeMetricFamily, "order", "1 for what an operator has ordered and is in force.", ("kind",), _order),
    (CounterMetricFamily, "orders", "Orders of operators, and their ends.", ("kind", "outcome"), _orders),
    (
        CounterMetricFamily,
        "decisions_dropped",
        "Decisions that the decision log has not: its disk was too slow, or full.",
        (),
        _one("decisions_dropped"),
    ),
    (CounterMetricFamily, "errors", "Errors by the part they came from.", ("where",), _errors),
)


class MorphServeEndpoint:
    """Endpoint plugin (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "morphserve"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._poll = StatusPoll(self._ask)
        self._last = LastStatuses(self._poll)
        self._access = Access()
        self._refusals = Refusals()
        self._queue_limit = QueueLimit(None, self._refusals)
        self._floors = FloorDoor(self._refusals)
        self._collector = StatusCollector(self._poll)
        self._client: Any = None
        self._spare_time = SpareTime(None)
        self._sameness = Sameness()
        self._tasks = Tasks()
        self._reload = partial(reload_engines, self.call)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; who may use them is known once `init_state` has read the settings, and until then nobody."""
        router = APIRouter(prefix="/morphserve")
        add_status(router, self._last, lambda: self._access)
        add_reload(router, self._reload, lambda: self._access)
        add_admin(router, self._last, self, lambda: self._access)
        add_page(router, self._last, lambda: self._access)
        app.include_router(router)
        add_behind_shared(app, self._collector)
        app.add_middleware(ReceiptDoor, floors=self._floors)
        app.add_middleware(Shortcut, router=router, handlers=app.exception_handlers)

    async def init_state(self, engine_client: EngineClient, state: Any, args: Any) -> None:
        self._client = engine_client
        if engine_client is None:
            return
        settings = settings_of(engine_client.vllm_config)
        self._access = Access.of((settings or MorphServeConfig()).admin)
        add_to_own(self._collector)
        add_to_own(self._refusals)
        self._queue_limit = QueueLimit(engine_client, self._refusals)
        if hasattr(engine_client, "check_admission"):
            seams.wrap(seams.DOOR_CHECK, self._queue_limit.note_refusals, on=engine_client)
        self._spare_time = spare_time = SpareTime(engine_client)
        if hasattr(engine_client, "generate"):
            seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=engine_client)

        self._tasks.start(self._poll.run(self._tell))
        self._tasks.start(spare_time.run())
        on_hangup(self._reload, self._tasks)

    async def look(self) -> list[_Status]:
        """Ask every engine behind this API server for its status: what is shown from now on."""
        statuses = await self._poll.look()
        self._limit_queues(statuses)
        return statuses

    async def _ask(self) -> list[_Status]:
        """Return the status of every engine behind this API server, with what it does itself."""
        own = {"prepare": self._spare_time.as_json()}
        statuses = [status | own for status in await self.call("morphserve_status")]
        self._floors.hear(statuses)
        return statuses

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a utility method of every engine; the answers are in the order of the engines."""
        core = getattr(self._client, "engine_core", None)
        if core is None:
            return []
        answers = await core.call_utility_all_async(method, *args)
        return sorted((answer for answer in answers if answer is not None), key=itemgetter("engine"))

    def _tell(self, statuses: list[_Status]) -> None:
        """Let all know who go by what the engines said; none = they are silent."""
        self._limit_queues(statuses)
        self._spare_time.look(statuses)
        self._sameness.look(statuses)
        if not statuses:
            self._floors.hear(statuses)

    def _limit_queues(self, statuses: list[_Status]) -> None:
        """Let vLLM take what each engine allows to wait; while engines are silent all is taken, unless they drain."""
        known = statuses or [status for status in self._poll.last if status["max_queued_tokens"] == 0]
        self._queue_limit.apply([status["max_queued_tokens"] for status in known])


def make_endpoint() -> MorphServeEndpoint:
    """Make the plugin that the `vllm.endpoint_plugins` entry point names."""
    return MorphServeEndpoint()
