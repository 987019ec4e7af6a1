"""What is done when the alias points to another version: each arrow of the drawing, and every order of events."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from namesake_serving.rollout import (
    FIRST_WAIT,
    LONGEST_WAIT,
    Command,
    Refusal,
    State,
    Step,
    done,
    failed,
    seen,
    withdrawn,
)

ONE, TWO, THREE = "ccb/1", "ccb/2", "ccb/3"
LIVE = State(wanted=ONE, live=ONE)
FETCHING = State(wanted=TWO, live=ONE, coming=TWO, step=Step.FETCHING)
LOADING = replace(FETCHING, step=Step.LOADING)
PROVING = replace(FETCHING, step=Step.PROVING)
RETIRING = State(wanted=TWO, live=TWO, leaving=ONE, step=Step.RETIRING)
UNDER_WAY = [FETCHING, LOADING, PROVING]


def refused(state: State) -> dict[str, int]:
    """How often each refused version was tried."""
    return {version: refusal.tries for version, refusal in state.refused.items()}


def test_an_alias_that_moved_is_fetched() -> None:
    assert seen(LIVE, TWO, 0) == (FETCHING, Command.FETCH)


def test_an_alias_that_did_not_move_is_left_alone() -> None:
    assert seen(LIVE, ONE, 0) == (LIVE, None)


def test_at_the_start_the_first_version_seen_is_fetched() -> None:
    assert seen(State(), ONE, 0) == (State(wanted=ONE, coming=ONE, step=Step.FETCHING), Command.FETCH)


def test_an_alias_that_is_gone_leaves_what_is_live() -> None:
    assert seen(LIVE, None, 0) == (State(wanted=None, live=ONE), None)


def test_what_is_fetched_is_loaded() -> None:
    assert done(FETCHING, 0) == (LOADING, Command.LOAD)


def test_what_is_fetched_when_the_alias_has_moved_on_is_dropped_for_the_one_it_moved_to() -> None:
    state, command = done(replace(FETCHING, wanted=THREE), 0)
    assert (state, command) == (replace(FETCHING, wanted=THREE, coming=THREE), Command.FETCH)


def test_what_is_fetched_when_the_alias_went_back_to_what_is_live_is_dropped() -> None:
    assert done(replace(FETCHING, wanted=ONE), 0) == (LIVE, None)


def test_what_is_fetched_when_the_alias_moved_on_to_a_refused_one_is_dropped_and_nothing_is_tried() -> None:
    told = {THREE: Refusal("broken", 1, again=9)}
    assert done(replace(FETCHING, wanted=THREE, refused=told), 0) == (replace(LIVE, wanted=THREE, refused=told), None)


def test_what_is_fetched_when_the_alias_is_gone_is_not_loaded() -> None:
    assert done(replace(FETCHING, wanted=None), 0) == (State(wanted=None, live=ONE), None)


def test_what_is_loaded_has_to_prove_itself() -> None:
    assert done(LOADING, 0) == (PROVING, Command.PROVE)


def test_what_has_proved_itself_is_live_and_the_old_one_is_retired() -> None:
    assert done(PROVING, 0) == (RETIRING, Command.TURN_AND_RETIRE)


def test_when_the_old_one_is_retired_there_is_rest() -> None:
    assert done(RETIRING, 0) == (State(wanted=TWO, live=TWO), None)


def test_an_alias_that_moved_while_the_old_one_was_retired_is_fetched_then() -> None:
    state, command = seen(RETIRING, THREE, 0)
    assert (state.step, command) == (Step.RETIRING, None)
    state, command = done(state, 0)
    assert (state.coming, state.live, state.step, command) == (THREE, TWO, Step.FETCHING, Command.FETCH)


@pytest.mark.parametrize("state", UNDER_WAY, ids=lambda state: state.step.value)
def test_what_failed_is_refused_for_a_while_and_the_old_one_stays_live(state: State) -> None:
    after, command = failed(state, "broken", 100)
    refusal = Refusal("broken", 1, 100 + FIRST_WAIT)
    assert (after, command) == (State(wanted=TWO, live=ONE, refused={TWO: refusal}), None)


@pytest.mark.parametrize("state", [FETCHING, LOADING, PROVING, RETIRING], ids=lambda state: state.step.value)
def test_an_alias_that_moves_while_something_is_under_way_is_only_noted(state: State) -> None:
    assert seen(state, THREE, 0) == (replace(state, wanted=THREE), None)


@pytest.mark.parametrize("state", UNDER_WAY, ids=lambda state: state.step.value)
def test_after_a_failure_the_version_the_alias_moved_on_to_is_fetched_at_once(state: State) -> None:
    after, command = failed(replace(state, wanted=THREE), "broken", 0)
    assert (after.coming, command, refused(after)) == (THREE, Command.FETCH, {TWO: 1})


def test_an_old_one_that_could_not_be_retired_does_not_undo_the_new_one() -> None:
    assert failed(RETIRING, "stuck", 0) == (State(wanted=TWO, live=TWO), None)


def test_a_refused_version_is_tried_again_when_its_time_has_come_and_not_before() -> None:
    state, _ = failed(FETCHING, "broken", 100)
    assert seen(state, TWO, 100 + FIRST_WAIT - 0.001) == (state, None)
    assert seen(state, TWO, 100 + FIRST_WAIT)[1] is Command.FETCH


def test_each_wait_is_twice_as_long_up_to_the_longest() -> None:
    state, now, waits = FETCHING, 0.0, []
    for _ in range(10):
        state, _ = failed(state, "broken", now)
        waits.append(state.refused[TWO].again - now)
        now = state.refused[TWO].again
        state, command = seen(state, TWO, now)
        assert command is Command.FETCH
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert (waits[0], waits[-1]) == (FIRST_WAIT, LONGEST_WAIT)


def test_a_version_that_got_live_after_failures_is_not_refused_any_more() -> None:
    state, _ = done(replace(PROVING, refused={TWO: Refusal("slow", 3, 0), THREE: Refusal("broken", 1, 9)}), 0)
    assert refused(state) == {THREE: 1}


@pytest.mark.parametrize("between", [None, ONE])
def test_a_refused_version_is_tried_at_once_when_the_alias_left_and_came_back(between: str | None) -> None:
    state, _ = failed(FETCHING, "broken", 0)
    state, command = seen(state, between, 0)
    assert command is None
    state, command = seen(state, TWO, 0)
    assert (state.coming, command, refused(state)) == (TWO, Command.FETCH, {})


def test_a_refused_version_is_tried_at_once_also_when_the_alias_came_back_while_another_was_under_way() -> None:
    state, _ = failed(FETCHING, "broken", 0)
    state, command = seen(state, THREE, 0)
    assert (state.coming, command) == (THREE, Command.FETCH)
    state, _ = seen(state, TWO, 0)
    state, command = done(state, 0)
    assert (state.coming, command) == (TWO, Command.FETCH)


def test_of_ten_moves_while_one_is_fetched_only_the_last_is_loaded() -> None:
    state, loaded = FETCHING, []
    for number in range(3, 13):
        state, command = seen(state, f"ccb/{number}", 0)
        assert command is None
    command = Command.FETCH
    while command is not None:
        if command is Command.LOAD:
            loaded.append(state.coming)
        state, command = done(state, 0)
    assert loaded == ["ccb/12"]
    assert (state.live, state.step) == ("ccb/12", Step.REST)


def test_of_ten_moves_while_one_is_loaded_that_one_and_the_last_get_live() -> None:
    state, lived = LOADING, []
    for number in range(3, 13):
        state, _ = seen(state, f"ccb/{number}", 0)
    command: Command | None = Command.LOAD
    while command is not None:
        state, command = done(state, 0)
        if command is Command.TURN_AND_RETIRE:
            lived.append(state.live)
    assert lived == [TWO, "ccb/12"]


WHY = "half of its requests failed"


def test_a_version_that_is_withdrawn_is_retired_and_nothing_takes_its_place() -> None:
    state, command = withdrawn(LIVE, ONE, WHY, 0)
    assert (state.live, state.leaving, state.step, command) == (None, ONE, Step.RETIRING, Command.RETIRE)
    state, command = done(state, 0)
    assert (state.live, state.leaving, state.step, command) == (None, None, Step.REST, None)


def test_a_version_that_left_its_bounds_is_not_tried_again_before_the_alias_has_left_it() -> None:
    state, _ = done(withdrawn(LIVE, ONE, WHY, 0)[0], 0)
    assert seen(state, ONE, 1e9) == (state, None)
    state, command = seen(state, TWO, 1e9)
    assert (state.coming, command) == (TWO, Command.FETCH)
    assert seen(done(withdrawn(LIVE, ONE, WHY, 0)[0], 0)[0], None, 0)[0].refused[ONE].why == WHY
    state, _ = seen(done(withdrawn(LIVE, ONE, WHY, 0)[0], 0)[0], None, 0)
    assert seen(state, ONE, 0)[1] is Command.FETCH


def test_a_version_whose_alias_is_gone_is_taken_again_when_it_is_back() -> None:
    state, _ = seen(LIVE, None, 0)
    state, _ = done(withdrawn(state, ONE, "", 0)[0], 0)
    assert (state.refused, seen(state, ONE, 0)[1]) == ({}, Command.FETCH)


@pytest.mark.parametrize("state", UNDER_WAY, ids=lambda state: state.step.value)
def test_what_is_withdrawn_while_another_is_under_way_goes_when_that_is_live_or_has_failed(state: State) -> None:
    during, command = withdrawn(state, ONE, WHY, 0)
    assert (during.step, during.live, command) == (state.step, ONE, None)
    assert withdrawn(during, ONE, WHY, 0) == (during, None)
    after, command = failed(during, "broken", 0)
    assert (after.live, after.leaving, command) == (None, ONE, Command.RETIRE)
    after, command = during, None
    while command is not Command.TURN_AND_RETIRE:
        after, command = done(after, 0)
    assert (after.live, after.leaving, after.unwanted) == (TWO, ONE, False)
    assert done(after, 0)[1] is None


def test_what_is_not_live_any_more_cannot_be_withdrawn() -> None:
    assert withdrawn(RETIRING, ONE, WHY, 0) == (RETIRING, None)


@pytest.mark.parametrize("answer", [lambda: done(LIVE, 0), lambda: failed(LIVE, "broken", 0)])
def test_an_answer_when_nothing_is_under_way_is_a_mistake(answer: object) -> None:
    assert callable(answer)
    with pytest.raises(ValueError, match="nothing is under way"):
        answer()


class Rollout(RuleBasedStateMachine):
    """A registry that moves the alias at will, a clock, and an executor whose commands succeed or fail at will."""

    VERSIONS = st.sampled_from([f"ccb/{number}" for number in range(1, 6)])

    def __init__(self) -> None:
        super().__init__()
        self.state, self.now = State(), 0.0
        self.under_way: Command | None = None
        self.did: list[tuple[Command, str | None]] = []  # succeeded, in order, with the version it was about
        self.wanted: str | None = None
        self.tries: Counter[str] = Counter()  # failures in a row since the alias last came to the version
        self.not_before: dict[str, float] = {}
        self.gone: str | None = None  # withdrawn, and not retired yet

    def take(self, answer: tuple[State, Command | None]) -> None:
        """Take the next state; a command may come only when none is under way."""
        before, (self.state, command) = self.state, answer
        if command is not None:
            assert self.under_way is None, "a second command while one is under way"
            self.under_way = command
        if command is Command.FETCH:
            assert self.state.coming == self.wanted
            assert self.now >= self.not_before.get(self.state.coming or "", 0), "tried before its time"
        if command is Command.LOAD:
            assert self.wanted in (None, self.state.coming), "loaded though the alias had moved on"
        if command is Command.RETIRE:
            assert (self.state.live, self.state.leaving) == (None, self.gone)
        elif self.state.live != before.live:
            proof = [(step, self.state.live) for step in (Command.FETCH, Command.LOAD, Command.PROVE)]
            assert self.did[-3:] == proof, "live without having been fetched, loaded and proved, in this order"

    @initialize(version=VERSIONS)
    def start(self, version: str) -> None:
        """The alias is seen for the first time."""
        self.see(version)

    @rule(version=VERSIONS)
    def see(self, version: str) -> None:
        """The registry is asked."""
        came = version != self.wanted
        if came and self.state.step is Step.REST:
            self.forget(version)
        self.wanted = version
        self.take(seen(self.state, version, self.now))
        if came and version not in self.state.refused:
            self.forget(version)

    def forget(self, version: str | None) -> None:
        """What failed before counts no more."""
        self.tries.pop(version or "", None)
        self.not_before.pop(version or "", None)

    @rule()
    def see_none(self) -> None:
        """The registry is asked and the alias is gone."""
        self.wanted = None
        self.take(seen(self.state, None, self.now))

    @precondition(lambda self: self.state.live is not None and self.gone is None)
    @rule(bad=st.booleans())
    def withdraw(self, bad: bool) -> None:
        """What is live answers no more: it left its bounds, or its alias is gone."""
        version = self.state.live
        assert version is not None
        if not bad:
            self.see_none()
        self.gone = version
        if bad:
            self.tries[version] += 1
            self.not_before[version] = math.inf
        self.take(withdrawn(self.state, version, "out of bounds" if bad else "", self.now))

    @rule()
    def ask_again(self) -> None:
        """The registry is asked and nothing has moved."""
        self.take(seen(self.state, self.wanted, self.now))

    @rule(seconds=st.sampled_from([0.5, FIRST_WAIT, 60.0, LONGEST_WAIT]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def succeed(self) -> None:
        """The command under way succeeds."""
        assert self.under_way is not None
        retired = self.under_way is Command.TURN_AND_RETIRE
        if self.under_way in (Command.RETIRE, Command.TURN_AND_RETIRE) and self.state.leaving == self.gone:
            self.gone = None
        self.did.append((self.under_way, self.state.live if retired else self.state.coming))
        if self.under_way is Command.PROVE:
            self.forget(self.state.coming)
        self.under_way = None
        self.take(done(self.state, self.now))

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def fail(self) -> None:
        """The command under way fails."""
        if self.under_way is Command.RETIRE:
            self.did.append((Command.RETIRE, None))  # it answers no more, however badly it went
        if self.under_way in (Command.RETIRE, Command.TURN_AND_RETIRE):
            self.gone = None if self.state.leaving == self.gone else self.gone
        else:
            version = self.state.coming
            assert version is not None
            self.tries[version] += 1
            wait = min(FIRST_WAIT * 2 ** (self.tries[version] - 1), LONGEST_WAIT)
            self.not_before[version] = self.now + wait
        self.under_way, live = None, self.state.live
        self.take(failed(self.state, "broken", self.now))
        assert self.state.live == (live if live != self.gone else None)

    @rule()
    def settle(self) -> None:
        """From now on every command succeeds and time passes: what is wanted gets live."""
        for _ in range(4):
            while self.under_way is not None:
                self.succeed()
            self.now += LONGEST_WAIT
            self.ask_again()
        assert self.under_way is None
        assert self.state.step is Step.REST
        assert not self.state.unwanted
        if self.wanted is not None and self.not_before.get(self.wanted) != math.inf:
            assert self.state.live == self.wanted

    @invariant()
    def what_is_known_fits_what_is_under_way(self) -> None:
        """The step names the command under way; it is about a version exactly when it has to be."""
        assert self.state.wanted == self.wanted
        assert (self.state.step is Step.REST) == (self.under_way is None)
        assert (self.state.coming is not None) == (self.state.step in (Step.FETCHING, Step.LOADING, Step.PROVING))
        assert self.state.leaving is None or self.state.step is Step.RETIRING
        assert self.state.coming is None or self.state.coming != self.state.live

    @invariant()
    def something_stays_live(self) -> None:
        """From the first version that got live there is always one, unless it was withdrawn."""
        turned = [version for command, version in self.did if command in (Command.PROVE, Command.RETIRE)]
        if self.under_way is Command.RETIRE:
            assert self.state.live is None
        else:
            assert self.state.live == (turned[-1] if turned else None)

    @invariant()
    def refusals_are_those_that_failed_and_double(self) -> None:
        """Tries and times are as counted here."""
        assert refused(self.state) == dict(self.tries)
        assert {version: refusal.again for version, refusal in self.state.refused.items()} == self.not_before


Rollout.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_in_any_order_of_events = Rollout.TestCase
