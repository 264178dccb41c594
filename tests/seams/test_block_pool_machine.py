"""VllmBlockPool on vLLM's real KVCacheManager: any order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from seams.pool_harness import FLOOR, MAX_BLOCKS, KVModel, check_invariants, make_request


class PoolMachine(RuleBasedStateMachine):
    """Requests come, grow, share prefixes, end and are preempted while the pool resizes and levels change."""

    @initialize(blocks=st.integers(FLOOR, MAX_BLOCKS - 1))
    def start(self, blocks: int) -> None:
        self.kv = KVModel()
        self.names = iter(range(10_000))
        self.kv.begin(blocks)
        self.kv.finish()

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.kv.requests)))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=18))
    def arrive(self, tokens: list[int]) -> None:
        self.kv.step(make_request(f"r{next(self.names)}", tokens))

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data(), extra=st.lists(st.integers(0, 1), min_size=0, max_size=3))
    def fork(self, data: st.DataObject, extra: list[int]) -> None:
        prefix = list(self.kv.requests[self.pick(data)].all_token_ids)
        self.kv.step(make_request(f"r{next(self.names)}", (prefix + extra)[:20]))

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        request = self.kv.requests[self.pick(data)]
        if request.num_tokens < 23:
            request.append_output_token_ids(token)
            if not self.kv.step(request):
                self.kv.end(request.request_id)

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.kv.end(self.pick(data))

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data())
    def preempt_and_resume(self, data: st.DataObject) -> None:
        request = self.kv.preempt(self.pick(data))
        if not self.kv.step(request):
            self.kv.provenance.forget(request.request_id)

    @rule(level=st.integers(0, 2))
    def switch_level(self, level: int) -> None:
        self.kv.set_level(level)

    @precondition(lambda self: self.kv.fence is None)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        self.kv.port.grow(data.draw(st.integers(self.kv.port.num_kv_blocks, MAX_BLOCKS)))

    @precondition(lambda self: self.kv.fence is None and self.kv.port.num_kv_blocks > FLOOR)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.kv.begin(data.draw(st.integers(FLOOR, self.kv.port.num_kv_blocks - 1)))

    @precondition(lambda self: self.kv.fence is not None)
    @rule(max_copies=st.integers(0, 6), then_finish=st.booleans())
    def advance(self, max_copies: int, then_finish: bool) -> None:
        if self.kv.advance(max_copies) == 0 and then_finish:
            self.kv.finish()

    @precondition(lambda self: self.kv.fence is not None)
    @rule()
    def cancel(self) -> None:
        self.kv.cancel()

    @invariant()
    def everything_holds(self) -> None:
        """Guards against a block handed out twice, lost, leaked, read after its move, or degraded."""
        if hasattr(self, "kv"):
            check_invariants(self.kv)

    def teardown(self) -> None:
        """Guards against blocks that no sequence of ends gives back."""
        if not hasattr(self, "kv"):
            return
        for request_id in list(self.kv.requests):
            self.kv.end(request_id)
        if self.kv.fence is not None:
            assert self.kv.advance(0) == 0
            self.kv.finish()
        check_invariants(self.kv)
        assert self.kv.port.num_used_blocks == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
