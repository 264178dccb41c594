"""The policy's queue limit becomes vLLM's, and goes again."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from vllm.config import ParallelConfig, SchedulerConfig
from vllm.exceptions import MaxQueuedTokensError
from vllm.v1.engine.async_llm import AsyncLLM

from morphserve.integration import seams
from morphserve.integration.server.queue_limit import QueueLimit
from morphserve.integration.server.scrape import Refusals


class Client(SimpleNamespace):
    """Can be patched, unlike what it is made of."""


def client(own: int | None) -> Client:
    """As far as vLLM's check of the door, and ours, know it."""
    config = SchedulerConfig.default_factory(max_model_len=512, is_encoder_decoder=False, max_num_queued_tokens=own)
    return Client(
        scheduler_config=config, admission_stats=None, get_num_queued_tokens=lambda: 400,
        get_num_unfinished_requests=int,
        _record_admission_rejection=lambda reason: None,
    )  # fmt: skip


def is_refused(at: SimpleNamespace) -> bool:
    try:
        AsyncLLM.check_admission(at)
    except MaxQueuedTokensError:
        return True
    return False


def test_vllm_refuses_by_the_policys_limit_and_takes_requests_again() -> None:
    """Guards: vLLM reads its limit once, or elsewhere; a limit that stays after the overload."""
    at = client(None)
    limit = QueueLimit(at, Refusals())
    assert not is_refused(at)
    limit.apply([300])
    assert is_refused(at)
    limit.apply([500])
    assert not is_refused(at)
    limit.apply([300])
    limit.apply([None])
    assert not is_refused(at) and at.scheduler_config.max_num_queued_tokens is None


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        (None, [300], {"shed": 1, "drain": 0, "floor": 0}),
        (None, [0], {"shed": 0, "drain": 1, "floor": 0}),
        (350, [300], {"shed": 1, "drain": 0, "floor": 0}),
        (350, [380], {"shed": 0, "drain": 0, "floor": 0}),  # the user's own, as without us
        (350, [None], {"shed": 0, "drain": 0, "floor": 0}),
        (None, [500], {"shed": 0, "drain": 0, "floor": 0}),  # taken
    ],
)
def test_what_our_limit_refuses_is_counted(own: int | None, limits: list[int | None], expected: dict[str, int]) -> None:
    """Guards: requests that we have refused and no metric tells of; others that a user's own limit refuses."""
    at, refusals = client(own), Refusals()
    at.check_admission = partial(AsyncLLM.check_admission, at)
    limit = QueueLimit(at, refusals)
    limit.apply(limits)
    seams.wrap(seams.DOOR_CHECK, limit.note_refusals, on=at)
    with nullcontext() if sum(expected.values()) == 0 and own is None else pytest.raises(MaxQueuedTokensError):
        at.check_admission(request_id="r")
    (family,) = refusals.counter.collect()
    told = {s.labels["reason"]: s.value for s in family.samples if s.name == "morphserve:requests_refused_total"}
    assert told == expected


@pytest.mark.parametrize(("limits", "expected"), [([100], 100), ([900], 350), ([None], 350), ([], 350)])
def test_the_users_own_limit_stays(limits: list[int | None], expected: int) -> None:
    """Guards: a user's limit raised or lost by a policy."""
    at = client(350)
    limit = QueueLimit(at, Refusals())
    limit.apply([5])
    limit.apply(limits)
    assert at.scheduler_config.max_num_queued_tokens == expected


def test_api_servers_share_the_limit() -> None:
    """Guards: two API servers, of which each lets in as much as both may."""
    at = client(None)
    at.vllm_config = SimpleNamespace(parallel_config=ParallelConfig(_api_process_count=2, _api_process_rank=0))
    QueueLimit(at, Refusals()).apply([100, 200])
    assert at.scheduler_config.max_num_queued_tokens == 150
    QueueLimit(at, Refusals()).apply([1, 0])
    assert at.scheduler_config.max_num_queued_tokens == 1, "0 would refuse whoever comes to an empty server"


def test_engines_add_up() -> None:
    """Guards: replicas that could still serve are closed because one is full."""
    at = client(None)
    limit = QueueLimit(at, Refusals())
    limit.apply([100, 200])
    assert at.scheduler_config.max_num_queued_tokens == 300
    limit.apply([100, None])
    assert at.scheduler_config.max_num_queued_tokens is None
