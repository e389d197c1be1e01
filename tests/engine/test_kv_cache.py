"""Page ownership, and each cache setting shown to do what it says."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from mini_sglang.engine.cache_limits import CacheLimits
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Request
from mini_sglang.types import SamplingParams

from .fake_backend import EOS_IDS, Answer, Driver, FakeBackend, make_core, reference

ONE = SamplingParams(max_new_tokens=1)


def prompt_of(number: int, length: int = 12) -> list[int]:
    """A prompt that shares no token with those of other numbers, but for its length."""
    return [2 + number] * length


def driver_with(num_pages: int = 64, page_size: int = 4, **settings: object) -> Driver:
    return Driver(make_core(FakeBackend(num_pages, page_size), **settings))


def cached(driver: Driver, prompt: Sequence[int]) -> int:
    """How much of a prompt is in the cache, asked without touching it."""
    request = driver.core.make_request("probe", [*prompt, 39], ONE)
    return driver.core.cache.cached_prefix(request)


def test_prefix_cache_off_keeps_nothing() -> None:
    for on, expected in ((True, 12), (False, 0)):
        driver = driver_with(prefix_cache=on)
        driver.run(prompt_of(0), ONE)
        assert driver.run([*prompt_of(0), 30], ONE).cached_tokens == expected
        assert (driver.core.stats()["kv_tokens_cached"] > 0) is on


def test_prefix_cache_size_bounds_the_stored_prefixes() -> None:
    for size, kept in ((0, [0, 1, 2, 3, 4]), (2, [3, 4]), (4, [1, 2, 3, 4])):
        driver = driver_with(prefix_cache_size=size)
        for number in range(5):
            driver.run(prompt_of(number), ONE)
        assert [number for number in range(5) if cached(driver, prompt_of(number))] == kept
        assert driver.core.stats()["prefixes"] == len(kept)


def test_prefix_cache_size_holds_while_requests_run() -> None:
    driver = driver_with(prefix_cache_size=2)
    for number in range(2):
        driver.run(prompt_of(number), ONE)
    driver.add(prompt_of(2), SamplingParams(max_new_tokens=8, ignore_eos=True))
    driver.step()
    assert driver.core.stats()["prefixes"] == 2
    assert [number for number in range(3) if cached(driver, prompt_of(number))] == [1, 2]


def test_prefix_cache_size_drops_whole_prefixes_of_chunked_prompts() -> None:
    """A prompt computed in chunks is one prefix, however many edges it has in the tree."""
    for policy in ("lru", "lfu"):
        driver = driver_with(
            prefix_cache_size=3, prefix_cache_policy=policy, chunked_prefill=True, prefill_chunk_size=4
        )
        for number in range(4):
            driver.run(prompt_of(number, 16), ONE)
        assert [cached(driver, prompt_of(number, 16)) for number in range(4)] == [0, 16, 16, 16]


def test_prefix_cache_token_budget_bounds_what_nobody_uses() -> None:
    for budget, kept in ((65536, 60), (24, 24), (25, 24), (3, 0), (0, 0)):
        driver = driver_with(prefix_cache_token_budget=budget)
        for number in range(5):
            driver.run(prompt_of(number), ONE)
        assert driver.core.stats()["kv_tokens_cached"] == kept


def test_prefix_cache_token_budget_does_not_count_running_requests() -> None:
    driver = driver_with(prefix_cache_token_budget=0)
    name = driver.add(prompt_of(0), SamplingParams(max_new_tokens=8, ignore_eos=True))
    driver.step()
    assert driver.core.stats()["kv_tokens_cached"] == 12
    assert driver.run([*prompt_of(0), 30], ONE).cached_tokens == 12
    assert driver.answers[name].finish is not None
    assert driver.core.stats()["kv_tokens_cached"] == 0


def test_prefix_cache_max_tokens_leaves_long_prompts_out() -> None:
    driver = driver_with(prefix_cache_max_tokens=12)
    driver.run(prompt_of(0, 12), ONE)
    driver.run(prompt_of(1, 13), ONE)
    assert cached(driver, prompt_of(0, 12)) == 12
    assert cached(driver, prompt_of(1, 13)) == 0
    # A longer prompt still starts from what is there.
    assert driver.run(prompt_of(0, 20), ONE).cached_tokens == 12


@pytest.mark.parametrize(("policy", "kept"), [("lru", [1]), ("lfu", [0])])
def test_prefix_cache_policy_chooses_what_is_dropped(policy: str, kept: list[int]) -> None:
    driver = driver_with(prefix_cache_policy=policy, prefix_cache_token_budget=24)
    for _ in range(3):
        driver.run([*prompt_of(0), 30], ONE)
    driver.run(prompt_of(1), ONE)
    driver.run(prompt_of(2), ONE)
    expected = sorted([*kept, 2])
    assert [number for number in range(3) if cached(driver, prompt_of(number))] == expected


def test_lfu_counts_a_request_once_however_long_it_waits() -> None:
    driver = driver_with(num_pages=14, prefix_cache_policy="lfu")
    popular, waited = prompt_of(0, 8), prompt_of(1, 8)
    for prompt in (popular, waited):
        driver.run(prompt, ONE)
    for _ in range(3):
        driver.run([*popular, 30], ONE)
    # Holds most of the pool for many steps, while the next one waits for its pages.
    driver.add(prompt_of(2, 24), SamplingParams(max_new_tokens=10, ignore_eos=True))
    driver.step()
    late = driver.add([*waited, *prompt_of(3, 20)], ONE)
    for _ in range(8):
        driver.step()
        assert driver.answers[late].finish is None
    driver.core.abort(late)
    driver.core.cache._evict(driver.core.cache._tree.num_evictable_pages - 2)
    assert cached(driver, popular) == 8 and cached(driver, waited) == 0


def test_namespaces_do_not_share() -> None:
    driver = driver_with()
    driver.run(prompt_of(0), ONE, namespace="a")
    assert driver.run([*prompt_of(0), 30], ONE, namespace="b").cached_tokens == 0
    assert driver.run([*prompt_of(0), 30], ONE, namespace="a").cached_tokens == 12


def test_clear_drops_what_nobody_uses() -> None:
    driver = driver_with()
    driver.run(prompt_of(0), ONE)
    driver.add(prompt_of(1), SamplingParams(max_new_tokens=8, ignore_eos=True))
    driver.step()
    assert driver.core.cache.clear() == 12
    assert cached(driver, prompt_of(0)) == 0 and cached(driver, prompt_of(1)) == 12
    driver.drain()


def test_answers_are_kept_for_the_next_turn() -> None:
    driver = driver_with()
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    first = driver.run(prompt_of(0), params)
    turn = [*prompt_of(0), *first.token_ids, 30, 31]
    # 20 of the 21 tokens are computed (the last one never is), five whole pages.
    assert driver.run(turn, ONE).cached_tokens == 20


def manager(num_pages: int = 8, page_size: int = 4, **limits: object) -> KVCacheManager:
    return KVCacheManager(num_pages, page_size, CacheLimits(**limits))  # type: ignore[arg-type]


def request_of(tokens: Sequence[int]) -> Request:
    return Request("r", list(tokens), len(tokens), ONE, 1, 0, EOS_IDS)


def compute(cache: KVCacheManager, request: Request) -> None:
    cache.attach(request)
    assert cache.extend(request, len(request.tokens))
    request.num_computed = len(request.tokens)


def test_extend_without_room_changes_nothing() -> None:
    cache = manager(num_pages=3)
    request = request_of(range(5))
    compute(cache, request)
    pages = array("i", request.pages)
    assert not cache.extend(request, 13)
    assert request.pages == pages and cache.num_free == 1
    assert cache.extend(request, 12) and len(request.pages) == 3


def test_the_second_to_publish_takes_the_first_ones_pages() -> None:
    cache = manager()
    first, second = request_of(range(9)), request_of([*range(8), 20])
    compute(cache, first)
    compute(cache, second)
    own = set(second.pages)
    cache.publish(first)
    cache.publish(second)
    assert second.pages[:2] == first.pages[:2] and second.pages[2] in own
    assert (cache.num_cached, cache.num_private, cache.num_free) == (2, 2, 4)
    cache.check([first, second])
    cache.release(first, keep=True)
    assert cache.extend(second, 24), "the pages of the first are not given away"
    assert not cache.extend(second, 33)
    cache.check([second])


def test_a_page_half_full_is_never_shared() -> None:
    cache = manager()
    request = request_of(range(7))
    compute(cache, request)
    cache.publish(request)
    assert (cache.num_cached, cache.num_private) == (1, 1)


def test_release_gives_everything_back() -> None:
    for keep, left in ((False, 0), (True, 2)):
        cache = manager()
        request = request_of(range(9))
        compute(cache, request)
        cache.release(request, keep=keep)
        assert (cache.num_cached, cache.num_private, cache.num_free) == (left, 0, 8 - left)
        assert (request.num_computed, len(request.pages), request.node) == (0, 0, None)
        cache.check()


def test_check_sees_a_lost_and_a_shared_page() -> None:
    cache = manager()
    one, two = request_of(range(4)), request_of(range(8, 12))
    compute(cache, one)
    compute(cache, two)
    cache.check([one, two])
    with pytest.raises(AssertionError):
        cache.check([one])
    two.pages[0] = one.pages[0]
    with pytest.raises(AssertionError):
        cache.check([one, two])


def test_eviction_makes_room_for_a_new_prompt_and_is_counted() -> None:
    driver = driver_with(num_pages=6)
    driver.run(prompt_of(0, 20), ONE)
    answer: Answer = driver.run(prompt_of(1, 20), ONE)
    assert answer.token_ids == reference(prompt_of(1, 20), ONE).token_ids
    stats = driver.core.stats()
    assert stats["prefix_evicted_tokens"] == 16
    # The older prefix lost its tail and kept its head.
    assert cached(driver, prompt_of(0, 20)) == 4
