"""Asks the policy at every step boundary, and moves the engine to the level it wants."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from morphserve.config import MorphServeConfig
from morphserve.control.budget import Ledgers, RankBytes
from morphserve.control.decisions import Action, DecisionLog, PolicyHost
from morphserve.control.health import Counters, Health
from morphserve.control.monitor import Monitor
from morphserve.control.ranks import BlockPoolPort, EngineView, ExecutorPort, RanksUnknown
from morphserve.control.runner import SwapRunner
from morphserve.control.transition import Direction, ErrorPlace, Phase, TransitionHistory
from morphserve.control.transition_book import TransitionBook
from morphserve.errors import ConfigError, OrderError
from policies import Ladder, Policy, PolicySetup

logger = logging.getLogger(__name__)

_ENDED = (Health.DEAD, Health.LOST)


class Controller:
    """The way from the policy's answers to the ranks, one tick per engine step. O(1): nothing in it grows with uptime.

    Promises:
        1. The scheduler never hands out a block that some rank has not mapped.
        2. No rank unmaps a block that the scheduler can still hand out.
        3. weights + KV + staging stay within the budget of every rank's ledger, also in mid-transition.
        4. A rank that fails to prepare, or does not in time, leaves the old level in force on all ranks, one count
           and a back-off; one WARNING until that direction has reached a level, however often it is tried.
        5. `tick` and `look_back` never raise: a controller that has failed finishes or undoes what is under way, and
           then leaves the engine at the level it has.
        6. No token of a step reaches anybody that ran after a rank has failed to do what cannot fail: its request is
           computed again, or `lost` says why the engine must end. Who drives it calls `look_back` before it reads a
           step's tokens.
    """

    def __init__(
        self,
        ladder: Ladder,
        policy: Policy,
        pool: BlockPoolPort,
        executor: ExecutorPort,
        monitor: Monitor,
        config: MorphServeConfig,
        ledgers: Ledgers,
        *,
        ranks: Sequence[RankBytes],
        clock: Callable[[], float],
        log: DecisionLog | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> None:
        """Start at level 0, idle.

        Args:
            ladder: all levels, as `build_ladder` made them from `ranks`.
            policy: asked once per tick.
            pool: the scheduler's blocks, at level 0's count.
            executor: sends plans to all ranks.
            monitor: turns counters into signals.
            config: uses `kv` and `transition`.
            ledgers: of the ranks at level 0, see `make_ledgers`.
            ranks: bytes of each rank's layers and KV blocks.
            clock: monotonic seconds, the one the monitor's events use.
            log: where decisions are recorded; None = nowhere.
            on_level: told the effective level whenever that changes.

        Raises:
            ConfigError: ladder, ranks and pool contradict each other.
        """
        self._ladder = ladder
        self._pool = pool
        self._monitor = monitor
        self._config = config
        self._ledgers = ledgers
        self._clock = clock
        self._on_level = on_level
        self._last_effective_level = 0  # that `on_level` was told
        self._runner = SwapRunner(ladder, ranks, pool, executor, ledgers, config)
        self._layer_state = self._runner.layer_state
        self.counters = Counters(num_blocks_published=pool.num_kv_blocks, num_blocks_mapped=pool.num_kv_blocks)
        self._policy_host = PolicyHost(policy, ladder, self.counters, log, clock)
        self._policy_host.kind = config.policy.kind
        self._book = TransitionBook(config.transition, self.counters, self._layer_state, pool, self._policy_host)
        self._driven_s = 0.0  # when the transition was last worked on
        self.health = Health.RUNNING
        self.lost = ""  # why nothing may be served any more, in words

    # ---- questions

    @property
    def level(self) -> int:
        """Committed level: the deepest that is fully reached."""
        return self._layer_state.current

    @property
    def target_level(self) -> int:
        """Level that the transition under way is heading for; == level when there is none."""
        return self.level if self._book.under_way is None else self._policy_host.decision.level

    @property
    def effective_level(self) -> int:
        """The level that tokens count for: between two levels, the deeper one."""
        return self._layer_state.effective_level

    @property
    def level_ahead(self) -> int:
        """The deepest level that tokens count for, or will at the end of the transition under way."""
        return max(self.effective_level, 0 if self.failed else self.target_level)

    @property
    def history(self) -> TransitionHistory:
        """The transitions that have ended, and who is told of each."""
        return self._book.history

    @property
    def phase(self) -> Phase:
        """Phase of the swap batch under way."""
        return self._runner.phase

    @property
    def max_queued_tokens(self) -> int | None:
        """Requests beyond so many waiting prompt tokens are to be refused at the door; None = none are."""
        return None if self.failed else self._policy_host.max_queued_tokens

    @property
    def min_floor(self) -> int:
        """Requests that ask not to be served below a shallower level are to be refused at the door; 0 = none are."""
        return 0 if self.failed else self._policy_host.decision.min_floor

    @property
    def in_transition(self) -> bool:
        """Whether the next step has something to do here, whatever the policy says."""
        if self.health in _ENDED:
            return False
        return self.phase is not Phase.IDLE or (not self.failed and self._book.under_way is not None)

    @property
    def failed(self) -> bool:
        """Whether an error ended morphing: it never starts again."""
        return self.health is not Health.RUNNING

    @property
    def wants_wakeup(self) -> bool:
        """Whether an idle engine must call `tick` now, or it would stay where it is. Any thread may ask."""
        if self.health in _ENDED:
            return False
        if self._runner.phase is not Phase.IDLE:
            return True
        if self.failed:
            return False
        if self._policy_host.has_news:
            return True
        # vLLM's workers poll without a pause for a second after each step: a wake-up a second is a busy core.
        target = self._layer_state.next_target(self._policy_host.decision.level)
        if target is None:
            return self.effective_level > 0 and not self._policy_host.decision.is_final
        direction = self._layer_state.direction(target)
        return self._book.backoff.would_allow(self._clock(), direction, self._pool.num_used_blocks)

    def status(self) -> dict[str, Any]:
        """Return everything an operator may ask, ready for JSON."""
        transitions = {f"{d}_{outcome}": n for (d, outcome), n in self.counters.transitions.items()}
        ledgers = self._ledgers.snapshots()
        decision = self._policy_host.decision
        return {
            "level": self.level,
            "target_level": self.target_level,
            "exposure_level": self.effective_level,
            "deepest_level": len(self._ladder) - 1,
            "wanted_level": decision.level,
            "reason": decision.reason,
            "predictions": self._policy_host.predictions,
            "holds": self._policy_host.holds_as_json(),
            "phase": self.phase.name.lower(),
            "revision": self._runner.revision,
            "failed": self.failed,
            "orders": self._policy_host.orders_as_json(),
            "max_queued_tokens": self.max_queued_tokens,
            "min_floor": self.min_floor,
            "layers_by_format": self._layer_state.layers_by_format(),
            "num_kv_blocks": self._pool.num_kv_blocks,
            "used_kv_blocks": self._pool.num_used_blocks,
            "ledger": ledgers[self._ledgers.tightest],
            "ledgers": ledgers,
            "ranks": {str(rank): asdict(held) for rank, held in sorted(self._runner.replies.ranks.items())},
            "recent_transitions": self._book.as_json(self._clock()),
            "counters": {**asdict(self.counters), "transitions": transitions},
        }

    # ---- from outside

    def replace_policy(self, policy: Policy, note: str, setup: PolicySetup) -> None:
        """Ask `policy` from the next tick on; it goes on from the level and the transition that are then.

        May be called by any thread. Of two before one tick the later counts.

        Args:
            policy: that has been asked nothing yet.
            note: why, in words, for the log.
            setup: what it was made of, for the decision log.

        Raises:
            ConfigError: no policy is asked any more.
        """
        self.check_asks()
        self._policy_host.replace(policy, note, setup)

    def check_asks(self) -> None:
        """Say whether a policy is asked.

        Raises:
            ConfigError: none is any more.
        """
        if self.failed:
            raise ConfigError("MorphServe gave up after an error, no policy is asked any more. Restart the server.")

    def order(self, action: Action, text: str, revision: int, is_rehearsal: bool, refusal: str = "") -> None:
        """Put an operator's order in force from the next tick on, see `PolicyHost.order`."""
        if self.failed:
            raise OrderError("failed", "MorphServe gave up after an error and takes no order. Restart the server")
        self._policy_host.order(action, text, revision, self.target_level, is_rehearsal, refusal)

    # ---- one step

    def tick(self, view: EngineView) -> None:
        """Ask the policy, then take the transition as far as replies allow. Never raises or blocks."""
        if self.health in _ENDED:
            self._look_at_answers()
            return
        place: ErrorPlace = "clock"
        try:
            now = self._clock()
            if not self.failed:
                place = "monitor"
                pool = self._pool
                signals = self._monitor.snapshot(
                    now, view, pool.num_kv_blocks, pool.num_used_blocks, self.level, self.target_level
                )
                place = "policy"
                self._policy_host.consult(signals, self.effective_level == 0 and self._book.under_way is None)
        except Exception:
            self._fail(place)
        self._guarded(self._drive)

    def look_back(self) -> None:
        """Look whether a rank has failed to do what cannot fail, before a step's tokens are read. Never raises.

        A step's own answer comes after those to the commands that were sent before it.
        """
        if self.health in _ENDED:
            self._look_at_answers()
        else:
            self._guarded(lambda now: self._runner.has_failed and self._take_answers(now))

    def _guarded(self, work: Callable[[float], object]) -> None:
        try:
            work(self._clock())
            self._publish()
        except RanksUnknown as e:
            self._lose(str(e))
        except Exception:
            self._die()

    def _drive(self, now: float) -> None:
        """Finish the swap batch under way if its replies are in, and open the next one."""
        runner = self._runner
        runner.replies.pause_s = 0.0
        if not self._take_answers(now):
            return
        target = self._next_target(now)
        if target is None or runner.replies.copies:
            return
        if self._book.under_way is None:
            self._book.open(now, target, runner.revision + 1)
        runner.start(now, target)
        # An executor that answers at once commits here. The next swap batch still waits for the next
        # step boundary: two in one gap would double the pause.
        if self._advance(now):
            self._next_target(now)

    def _take_answers(self, now: float) -> bool:
        """Go as far as the answers allow; True when no swap batch is under way."""
        runner, self._driven_s = self._runner, now
        runner.replies.drop_late()
        if self._book.under_way is not None and runner.phase is not Phase.IDLE:
            return self._advance(now)
        if failed := runner.take_copies():  # of a drain that was given up
            self.counters.count_error("kv_unknown")
            logger.warning("morph: %s", failed)
        return self._book.under_way is not None or runner.grow_again(now, may_start=not self.failed)

    def _advance(self, now: float) -> bool:
        """Let the swap batch go on; True when it has ended."""
        transition = self._book.under_way
        assert transition is not None
        end = self._runner.advance(now, self._is_wanted(transition.direction))
        self._book.note_pause(self._runner.replies.pause_s)
        if end is None:
            return False
        if end.outcome == "committed":
            self._book.add(end)
        elif end.outcome == "aborted":
            self._book.abort(now, end)
        else:
            self._book.close(now, "cancelled")
        return True

    def _is_wanted(self, direction: Direction) -> bool:
        """Return whether the newest decision still lies in the direction of the swap batch under way."""
        if self.failed:
            return False
        if direction == "degrade":
            return self._policy_host.decision.level > self.level
        return self._policy_host.decision.level < self.effective_level

    def _next_target(self, now: float) -> int | None:
        """Return the target of the next swap batch; close the transition when it is done or must turn."""
        state = self._layer_state
        target = None if self.failed else state.next_target(self._policy_host.decision.level)
        transition = self._book.under_way
        direction = None if target is None else state.direction(target)
        if transition is not None and direction != transition.direction:
            self._book.close(now, "committed" if target is None and not self.failed else "cancelled")
        self._book.backoff.see_room(self._pool.num_used_blocks)
        if direction is not None and not self._book.backoff.allows(now, direction):
            return None
        return target

    def _publish(self) -> None:
        """Bring gauges up to date and report a new effective level."""
        counters, runner, effective_level = self.counters, self._runner, self.effective_level
        counters.num_blocks_published = self._pool.num_kv_blocks
        counters.short_grows = runner.short_grows
        counters.forced_preemptions = runner.preemptions.total
        if runner.replies.ranks:
            counters.num_blocks_mapped = min(rank.num_kv_blocks for rank in runner.replies.ranks.values())
        if runner.replies.pause_s > 0:
            counters.last_pause_s = runner.replies.pause_s
            counters.max_pause_s = max(counters.max_pause_s, runner.replies.pause_s)
        if self._on_level is not None and effective_level != self._last_effective_level:
            try:
                self._on_level(effective_level)
                self._last_effective_level = effective_level
            except Exception:
                # Who must know of the level does not: told again at the next step, and no new transition.
                self._fail("on_level")

    # ---- errors

    def fail(self, place: ErrorPlace) -> None:
        """Rest because what feeds the controller broke outside of it: the same as an error of the policy."""
        if not self.failed:
            self._fail(place)

    def _fail(self, place: ErrorPlace) -> None:
        """Undo or finish, then rest: the policy or what feeds it is broken; ranks and pool are fine."""
        self.counters.count_error(place)
        self.health = self.health.to(Health.RESTING)
        logger.exception("morph: %s failed; the engine stays at level %d, for good", place, self.level)

    def _die(self) -> None:
        """Leave everything where it is safe, and send nothing more: a transition broke half-way."""
        self.counters.count_error("controller")
        self.health = self.health.to(Health.DEAD)
        logger.exception("morph: %s failed; the engine stays at level %d, for good", self.phase.name, self.level)
        self._book.give_up(self._driven_s, "it broke half-way")
        try:
            self._runner.wind_down()
        except Exception as e:
            self.counters.count_error("wind_down")
            logger.exception("morph: giving back fenced blocks and staged layers failed")
            if self._runner.is_moving_blocks:
                self._lose(f"blocks have moved for which no rank has copied the KV, and {type(e).__name__}: {e}")

    def _lose(self, why: str) -> None:
        """Have the engine end: what a rank holds is unknown, or not what the others hold."""
        self.counters.count_error("ranks_unknown")
        self.health = self.health.to(Health.LOST)
        self.lost = f"{self.phase.name} at level {self.level}: {why}"
        self._book.give_up(self._driven_s, why)

    def _look_at_answers(self) -> None:
        """Take what has come off the ring: nothing is sent any more, but ranks may still say that they differ."""
        if self.health is Health.LOST:
            return
        try:
            self._runner.check_unanswered()
        except RanksUnknown as e:
            self._lose(str(e))
        except Exception:
            self.counters.count_error("drain_replies")
