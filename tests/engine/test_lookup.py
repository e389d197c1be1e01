"""Guesses from the text against brute force, and when a guess pays."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.engine.acceptance import Chance, StepCosts, best_length
from mini_sglang.engine.lookup import PromptLookup, copied
from mini_sglang.engine.radix import RadixCache

from .fake_backend import examples


def agreeing(tokens: list[int], place: int) -> int:
    """How many tokens before ``place`` are those at the end of ``tokens``."""
    count = 0
    while count < min(16, place) and tokens[place - 1 - count] == tokens[len(tokens) - 1 - count]:
        count += 1
    return count


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 5), max_size=20))
@examples(300)
def test_the_longest_end_that_stood_before_is_found(tokens: list[int], pieces: list[int]) -> None:
    lookup, at = PromptLookup(), 0
    for piece in [*pieces, len(tokens)]:
        at += piece
        text = tokens[:at]
        length, place = lookup.find(text)
        # Of the places where the last two tokens stood the latest eight are looked at.
        pairs = [p for p in range(2, len(text)) if text[p - 2 : p] == text[-2:]][-8:]
        best = max((agreeing(text, p) for p in pairs), default=0)
        assert length == best
        assert place == (max(p for p in pairs if agreeing(text, p) == best) if pairs else 0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 30), st.data())
@examples(200)
def test_a_copy_goes_on_past_the_end_of_the_text(tokens: list[int], count: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    text = list(tokens)
    for _ in range(count):
        text.append(text[place + len(text) - len(tokens)])
    assert copied(tokens, place, count) == text[len(tokens) :]


@given(
    st.sampled_from([1, 2, 4]),
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), max_size=24)), min_size=1, max_size=6),
    st.integers(0, 24),
)
@examples(300)
def test_the_tree_tells_what_came_after_a_whole_text(
    page_size: int, inserted: list[tuple[int, list[int]]], cut: int
) -> None:
    tree = RadixCache(page_size)
    held: dict[str, list[list[int]]] = {"0": [], "1": []}
    page = 0
    for namespace, tokens in inserted:
        tokens = tokens[: len(tokens) // page_size * page_size]
        count = len(tokens) // page_size
        tree.insert(tokens, list(range(page, page + count)), str(namespace))
        page += count
        held[str(namespace)].append(tokens)
    text = inserted[-1][1][:cut]
    for namespace in ("0", "1"):
        found = tree.continuation(text, 7, namespace)
        behind = [tokens[len(text) :] for tokens in held[namespace] if tokens[: len(text)] == text]
        assert len(found) <= 7
        assert bool(found) == any(behind)
        # A path of the tree, cut or to its end.
        assert not found or any(tokens[: len(found)] == found for tokens in behind)
        assert len(found) == 7 or not found or found in behind
    tree.check()


def test_a_node_is_as_good_a_start_as_the_root() -> None:
    tree = RadixCache(2)
    tokens = list(range(20))
    node = tree.insert(tokens[:8], list(range(4))).node
    tree.insert(tokens, [*range(4), *range(10, 16)])
    for end in range(8, 20):
        assert tree.continuation(tokens[8:end], 5, node=node) == tokens[end : end + 5]
        assert tree.continuation(tokens[:end], 5) == tokens[end : end + 5]


def test_costs_are_learnt_from_steps_of_several_sizes() -> None:
    draw = random.Random(1)
    for base, row in ((3e-3, 0.5e-3), (10e-3, 0.01e-3), (0.1e-3, 2e-3)):
        costs = StepCosts()
        for _ in range(300):
            rows = draw.choice([1, 2, 4, 8, 16])
            stall = 50.0 if draw.random() < 0.02 else 1.0
            costs.observe(rows, (base + row * rows) * draw.uniform(0.95, 1.05) * stall)
        for rows in (1, 4, 16):
            true = base + row * rows
            assert abs(costs.step(rows) - true) < 0.35 * true


def test_a_guess_is_as_long_as_its_chance_and_the_batch_are_worth() -> None:
    costs = StepCosts()
    lengths = [best_length(costs, chance / 20, 15, 1, 1) for chance in range(21)]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 15
    for batch in (1, 4, 16, 64):
        counts = [best_length(costs, chance / 20, 15, batch, batch) for chance in range(21)]
        for chance, count in enumerate(counts):
            if count:
                gained = batch + sum((chance / 20) ** place for place in range(1, count + 1))
                assert gained / costs.step(batch + count) > batch / costs.step(batch)
    # Where rows cost as much as the tokens they may give, little is guessed.
    assert best_length(costs, 0.6, 15, 1, 1) > 0 == best_length(costs, 0.6, 15, 64, 64)
    # Nor where the guess itself costs more than the step it saves.
    assert best_length(costs, 0.9, 15, 1, 1, draft_cost=costs.step(1)) == 0


def test_a_chance_moves_to_what_was_seen() -> None:
    for right in (0, 1, 3):
        chance = Chance(0.5)
        for _ in range(60):
            chance.learn(3, right)
        tried = right + (right < 3)
        assert abs(chance.value - right / tried) < 0.05
