"""Speculative decoding: tokens guessed ahead, checked several at a time.

After Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, but
simpler: the draw for a request's n-th token depends on its seed, n and the logits alone, so the token
of every guessed place is chosen as ever, and a guess is right where it is that token. Nothing but the
number of steps depends on the guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mini_sglang.config import Settings
from mini_sglang.engine.acceptance import Chance, StepCosts, best_length
from mini_sglang.engine.drafts import Drafts
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.lookup import PromptLookup, copied
from mini_sglang.engine.request import Request
from mini_sglang.types import SamplingParams

if TYPE_CHECKING:
    from mini_sglang.engine.draft_model import DraftModel
    from mini_sglang.engine.scheduler import Scheduled

# Guesses by where they come from, and how probable they are right before any was tried.
TREE, MODEL = "tree", "model"
_PRIORS = {TREE: 0.85, MODEL: 0.7, "2": 0.3, "3": 0.5, "4": 0.7, "8": 0.85, "16": 0.9}
# Guesses turned down in a row, as not paying, after which a request counts as switched off; from then on it
# is looked at every few tokens, and now and then one guess is tried all the same.
_SWITCH_OFF, _LOOK_EVERY, _TRY_EVERY, _TRY_DEAR_EVERY = 8, 4, 8, 64
# Tokens of an earlier answer held ready, and tokens between two looks for one.
_GUIDE, _GUIDE_EVERY = 128, 16
# Most guesses of all requests in one step.
_MOST_ROWS = 256


def method_of(params: SamplingParams, settings: Settings) -> str:
    """How a request's tokens are guessed: ``off``, ``prompt_lookup`` or ``draft_model``."""
    wanted = params.speculative
    if wanted is None:
        return settings.speculation
    if wanted != "on":
        return wanted
    if settings.speculation != "off":
        return settings.speculation
    return "prompt_lookup" if settings.draft_model_name is None else "draft_model"


class Speculation:
    """What is known of one request for guessing its tokens.

    Attributes:
        by_model: whether the draft model is asked where the text says nothing.
        chances: by the kind of guess.
        turned_down: guesses in a row that did not pay.
        switched_off: whether that was ever often enough to say that guessing does not pay.
    """

    __slots__ = (
        "_guide",
        "_guide_at",
        "_lookup",
        "by_model",
        "chances",
        "skip",
        "switched_off",
        "turned_down",
    )

    def __init__(self, by_model: bool) -> None:
        self.by_model = by_model
        self.chances: dict[str, Chance] = {}
        self.turned_down = 0
        self.switched_off = False
        self.skip = 0
        self._lookup = PromptLookup()
        self._guide: list[int] = []  # what an earlier answer had from place _guide_at on
        self._guide_at = 0

    def chance(self, kind: str) -> Chance:
        chance = self.chances.get(kind)
        if chance is None:
            chance = self.chances[kind] = Chance(_PRIORS[kind])
        return chance

    def find(self, request: Request, cache: KVCacheManager, room: int) -> tuple[str, list[int]]:
        """The best guess of the next ``room`` tokens, and where it comes from; empty where there is none."""
        tokens = request.tokens
        guide = self._follow_guide(request, cache)[:room]
        if guide and self.chance(TREE).value >= 0.5:
            return TREE, guide
        length, place = self._lookup.find(tokens)
        if length < 2:
            return TREE, guide
        kind = str(length if length < 4 else 4 if length < 8 else 8 if length < 16 else 16)
        if guide and self.chance(TREE).value >= self.chance(kind).value:
            return TREE, guide
        return kind, copied(tokens, place, room)

    def _follow_guide(self, request: Request, cache: KVCacheManager) -> list[int]:
        """What came next in an answer that went like this one so far."""
        tokens = request.tokens
        passed = len(tokens) - self._guide_at
        guide = self._guide
        if guide and passed < len(guide) and tokens[self._guide_at :] == guide[:passed]:
            if passed >= _GUIDE_EVERY:
                del guide[:passed]
                self._guide_at = len(tokens)
                return guide
            return guide[passed:]
        # One that was read to its end may go on; after another, or none, a look costs a walk down the tree.
        if passed < _GUIDE_EVERY and self._guide_at and not (guide and passed >= len(guide)):
            return []
        self._guide = cache.continuation(request, _GUIDE)
        self._guide_at = len(tokens)
        return list(self._guide)


class Speculator:
    """Adds guesses to the steps that the scheduler plans, and learns what became of them.

    Used by the engine's thread alone, without torch and without text.

    Args:
        draft_model: guesses where the text says nothing; None where there is none.
        allowed: False where the model cannot take back what it has computed.

    Attributes:
        costs: what steps cost, as measured.
        switched_off: requests for which guessing turned out not to pay.
    """

    def __init__(
        self,
        settings: Settings,
        cache: KVCacheManager,
        draft_model: DraftModel | None = None,
        *,
        allowed: bool = True,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self.draft_model = draft_model
        self._allowed = allowed
        self.costs = StepCosts()
        self.switched_off = 0

    def begin(self, request: Request) -> Speculation | None:
        """What a new request needs for being guessed at; None where it is not to be."""
        method = method_of(request.params, self._settings)
        if method == "off" or request.prefill_only or not self._allowed:
            return None
        return Speculation(by_model=method == "draft_model" and self.draft_model is not None)

    def propose(self, plan: Sequence[Scheduled]) -> bool:
        """Give the decodes of ``plan`` their drafts, and pages for them where some are free.

        Returns:
            whether any request of it may be guessed at, so that the step's time is worth knowing.
        """
        if all(item.request.speculation is None for item in plan):
            return False
        rows = sum(item.num_tokens for item in plan)
        tokens = sum(item.samples for item in plan)
        left = _MOST_ROWS
        by_model: list[tuple[Scheduled, Speculation]] = []
        for item in plan:
            request, state = item.request, item.request.speculation
            if state is None or item.num_tokens != 1 or not item.samples or request.num_output == 0:
                continue
            room = min(self._settings.speculative_max_draft_tokens, left)
            room = min(room, request.max_new_tokens - request.num_output - 1)
            if room < 1:
                continue
            if state.skip:
                state.skip -= 1
                continue
            kind, guess = state.find(request, self._cache, room)
            chance = state.chance(kind).value
            count = best_length(self.costs, chance, len(guess), rows, tokens) if guess else 0
            if not count and state.by_model:
                by_model.append((item, state))
                continue
            if guess and not count:
                count = self._turn_down(state)
            elif guess:
                state.turned_down = 0
            if count:
                drafts = Drafts(request, count, kind)
                drafts.fill(guess[:count])
                left -= self._give(item, drafts)
        if by_model:
            self._ask_model(by_model, rows, tokens)
        return True

    def learn(self, request: Request, drafts: Drafts, accepted: int) -> None:
        """Take in that the first ``accepted`` of ``drafts`` were right."""
        state = request.speculation
        assert state is not None
        state.chance(drafts.kind).learn(len(drafts.tokens), accepted)
        self._cache.give_back(request)

    def note_step(self, plan: Sequence[Scheduled], seconds: float) -> None:
        """A step of ``plan`` took so long."""
        if plan and all(item.num_tokens == 1 for item in plan):
            self.costs.observe(
                sum(1 + len(item.drafts.tokens) if item.drafts else 1 for item in plan), seconds
            )

    def check(self) -> None:
        """Raises AssertionError where the draft model has lost a page."""
        if self.draft_model is not None:
            self.draft_model.check()

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if self.draft_model is not None:
            self.draft_model.release(request)

    def _turn_down(self, state: Speculation) -> int:
        """A guess does not pay; gives how many tokens are guessed all the same."""
        state.turned_down += 1
        if state.turned_down < _SWITCH_OFF:
            return 0
        if not state.switched_off:
            state.switched_off = True
            self.switched_off += 1
        state.skip = _LOOK_EVERY - 1
        return int(state.turned_down % _TRY_EVERY == 0)

    def _give(self, item: Scheduled, drafts: Drafts) -> int:
        """Put ``drafts`` into the plan as far as there are pages for them; gives how many."""
        if not drafts.tokens:
            return 0
        used = len(item.request.tokens)
        drafts.cut(self._cache.extend_for_drafts(item.request, used + len(drafts.tokens)) - used)
        if drafts.tokens:
            item.drafts = drafts
        return len(drafts.tokens)

    def _ask_model(self, asked: list[tuple[Scheduled, Speculation]], rows: int, tokens: int) -> None:
        """Drafts by the draft model, for all requests side by side."""
        model, most = self.draft_model, self._settings.speculative_max_draft_tokens
        assert model is not None
        # One run of the model makes a guess for each of them.
        cost = (model.cost or 0.3 * self.costs.step(1)) / len(asked)
        wanted: list[tuple[Scheduled, Drafts]] = []
        for item, state in asked:
            chance = state.chance(MODEL).value
            drafts = Drafts(item.request, most, MODEL)
            room = min(drafts.limit, _MOST_ROWS // len(asked))
            count = best_length(self.costs, chance, room, rows, tokens, cost) if room > 0 else 0
            if count:
                state.turned_down = 0
            elif room > 0:
                count = self._turn_down(state)
                # A model that would not pay if it were always right is seldom worth a try.
                if best_length(self.costs, 1.0, room, rows, tokens, cost) == 0:
                    count = int(state.turned_down % _TRY_DEAR_EVERY == 0)
            if count:
                drafts.limit = count
                wanted.append((item, drafts))
        if wanted:
            model.draft([drafts for _, drafts in wanted])
        for item, drafts in wanted:
            self._give(item, drafts)
