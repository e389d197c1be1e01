"""What guessing ahead gives at one stream: SPECULATIVE off and prompt_lookup by turns, over the same prompts.

    python benchmarks/speculative_bench.py [--model MODEL] [--draft-model MODEL] [--rounds 5] [--tokens 256]

Workloads: answers that repeat their prompt (summaries that quote, edits of code) and stories, which do not.
Greedy, and where it says so sampled with a seed. The prefix cache is off, so that nothing is guessed from
an answer of an earlier round. Answers must be the same, token for token. Seconds are those from an answer's
first token to its last; each prompt's median over the rounds counts, and beside it each prompt's best
round, which says more on a machine that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from mini_sglang import Engine, SamplingParams

PRICES = '''\
def total_price(items, tax_rate):
    """Sum the price of all items in stock and add tax."""
    total = 0
    for item in items:
        if item.quantity > 0:
            total = total + item.price * item.quantity
    total = total + total * tax_rate
    return total


def cheapest(items):
    """Return the item with the lowest price, or None."""
    best = None
    for item in items:
        if best is None or item.price < best.price:
            best = item
    return best


def restock(items, minimum):
    """Order what is needed so that every item has the minimum quantity."""
    orders = []
    for item in items:
        if item.quantity < minimum:
            orders.append((item.name, minimum - item.quantity))
    return orders
'''
QUEUE = """\
class JobQueue:
    def __init__(self, limit):
        self.limit = limit
        self.jobs = []
        self.finished = 0

    def push(self, job):
        if len(self.jobs) >= self.limit:
            raise OverflowError("the queue is full")
        self.jobs.append(job)

    def pop(self):
        if not self.jobs:
            return None
        job = self.jobs.pop(0)
        self.finished += 1
        return job

    def __len__(self):
        return len(self.jobs)
"""
MILL = """\
The river Aller rises in the hills west of Magdeburg and flows for two hundred kilometres to the Weser.
In the spring of 1911 the miller Johann Brandt built a wooden weir near Gifhorn, which raised the water
by two metres and drove three pairs of stones. For fifteen years the mill ground rye for the villages
around it, and in the winter months it also sawed oak for the shipyards downstream. The weir was washed
away in the flood of February 1926, together with the footbridge and the eel trap of the fisherman Karl
Behn. It was rebuilt in concrete two years later, paid for by the district, on the condition that a fish
pass was added on the left bank. The mill closed in 1958, and since 1974 a turbine in the old wheel
chamber has supplied about forty households with electricity."""
STORE = """\
The support team received a report that exports of large tables failed at night. The export job reads
the table in pages of one thousand rows and writes each page to the object store. At two o'clock the
backup job takes a lock on the table for about six minutes, and the export job gives up after five
minutes without a new page. The team first raised the timeout to ten minutes, which made the failures
stop but also hid a second problem: the export job did not delete the pages that it had written before
it failed, so the store filled up with partial exports. On Thursday the team changed the job so that it
removes its own pages when it fails, and moved the backup to four o'clock."""

_PRICES, _QUEUE = f"\n\n```python\n{PRICES}```", f"\n\n```python\n{QUEUE}```"
EDITS = [
    f"Rewrite this Python code with the variable `total` renamed to `amount`. Give the whole code.{_PRICES}",
    f"Add a line `# checked` above every function of this Python code and give the whole code.{_PRICES}",
    f"Rename the class to TaskQueue and give the whole Python code.{_QUEUE}",
    f"Add a docstring to each method of this Python class and give the whole class.{_QUEUE}",
]
SUMMARIES = [
    f"Summarise this text in three bullet points, each with a quote of a whole sentence from it.\n\n{MILL}",
    f"Copy the sentences of this text that name a year, word by word.\n\n{MILL}",
    f"Summarise this report. Quote the sentences that say what the cause was.\n\n{STORE}",
    f"List what happened in this report, in its own words.\n\n{STORE}",
]
STORIES = [
    "Write a story about a dragon who is afraid of heights.",
    "Describe a walk through a market in the early morning.",
    "Write a letter from a lighthouse keeper to his sister.",
    "Invent five animals and say how each of them lives.",
]
GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, seed=7)
WORKLOADS = {
    "code edits": (EDITS, GREEDY),
    "summaries with quotes": (SUMMARIES, GREEDY),
    "code edits, sampled": (EDITS, SAMPLED),
    "stories, greedy": (STORIES, GREEDY),
    "stories, sampled": (STORIES, SAMPLED),
}


@dataclass
class Tally:
    """One way over one workload: seconds by prompt and round, and counts of one round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def rate(self, of: Callable[[list[float]], float]) -> float:
        """Tokens a second, first tokens left out, where ``of`` chooses from a prompt's rounds."""
        return (self.tokens - len(self.seconds)) / sum(map(of, self.seconds.values()))


def answer(engine: Engine, prompt: str, params: SamplingParams, tally: Tally) -> list[int]:
    """Answer one prompt; its ids."""
    before = engine.stats()
    ids: list[int] = []
    first = now = 0.0
    with engine.stream([{"role": "user", "content": prompt}], params) as stream:
        for delta in stream:
            now = time.perf_counter()
            first = first or now
            ids.extend(delta.token_ids)
    after = engine.stats()
    if prompt not in tally.seconds:
        tally.tokens += len(ids)
        tally.steps += after["steps"] - before["steps"]
        tally.drafted += after["draft_tokens"] - before["draft_tokens"]
        tally.accepted += after["draft_tokens_accepted"] - before["draft_tokens_accepted"]
    tally.seconds.setdefault(prompt, []).append(now - first)
    return ids


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="by default what the engine would take")
    parser.add_argument("--draft-model", help="guess by this model instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--only", help="workloads whose name has this in it")
    args = parser.parse_args(None if argv is None else list(argv))
    on = "prompt_lookup" if args.draft_model is None else "draft_model"
    with Engine(
        args.model,
        prefix_cache=False,
        draft_model_name=args.draft_model,
        notify=lambda line: print(line, file=sys.stderr),
    ) as engine:
        print(engine.description)
        print(
            f"{'workload':22} {'off':>9} {'on':>9} {'ratio':>6} {'best':>6}  tokens  steps  drafted  accepted"
        )
        for name, (prompts, params) in WORKLOADS.items():
            if args.only and args.only not in name:
                continue
            params = replace(params, max_new_tokens=args.tokens)
            off, drafted = Tally(), Tally()
            for _ in range(args.rounds):
                for prompt in prompts:
                    plain = answer(engine, prompt, replace(params, speculative="off"), off)
                    if answer(engine, prompt, replace(params, speculative=on), drafted) != plain:
                        raise SystemExit(f"{name}: the answers differ")
            median, best = ((off.rate(of), drafted.rate(of)) for of in (statistics.median, min))
            rate = f"{drafted.accepted / drafted.drafted:.0%}" if drafted.drafted else "-"
            print(
                f"{name:22} {median[0]:7.1f}/s {median[1]:7.1f}/s {median[1] / median[0]:6.2f} "
                f"{best[1] / best[0]:6.2f}  {drafted.tokens:6} {drafted.steps:6}  "
                f"{drafted.drafted:7}  {rate:>8}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
