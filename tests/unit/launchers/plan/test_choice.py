"""The way that is chosen is the one that a search through all of them finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwright.launchers.plan.choice import AS_FAST, SMALLER, Way, choose, next_smaller

WAYS = st.builds(
    Way,
    strategy=st.sampled_from(("single", "ddp", "zero3")),
    place=st.integers(0, 2),
    micro_batch_size=st.sampled_from((1, 2, 4, 8)),
    tokens=st.sampled_from((512, 4096, 2**14, 2**15)),
    every_blocks=st.sampled_from((None, 2, 1)),
    seconds=st.floats(0.5, 1.5),
)


@given(st.dictionaries(WAYS, st.tuples(st.booleans(), st.integers(1, 100)), max_size=12))
def test_it_is_what_exhaustive_search_finds(ways: dict[Way, tuple[bool, int]]) -> None:
    chosen = choose(list(ways), lambda way: ways[way][0])
    fitting = [way for way, (fits, _) in ways.items() if fits]
    if not fitting:
        assert chosen is None
        return
    least = min(way.seconds for way in fitting)
    equals = [way for way in fitting if way.seconds <= least * (1 + AS_FAST)]
    assert chosen is not None
    assert chosen in equals
    assert chosen.plainness == min(way.plainness for way in equals)

    smaller = next_smaller(
        list(ways), chosen, lambda w: ways[w][0], lambda w: ways[w][1], lambda w: ways[w][1] // 2
    )
    below = [way for way in fitting if ways[way][1] <= SMALLER * ways[chosen][1]]
    assert (smaller is None) == (not below)
    if smaller is not None:
        assert smaller in below
        assert smaller.seconds <= min(way.seconds for way in below) * (1 + AS_FAST)


def way(**values: object) -> Way:
    settled = {
        "strategy": "ddp",
        "place": 1,
        "micro_batch_size": 8,
        "tokens": 2**14,
        "every_blocks": None,
        "seconds": 1.0,
    }
    return Way(**(settled | values))  # type: ignore[arg-type]


def test_of_equals_the_plainest_is_taken() -> None:
    plain = way()
    others = [
        way(place=2),
        way(every_blocks=1),
        way(every_blocks=2),
        way(tokens=2**13, micro_batch_size=4),
        way(tokens=2**15, micro_batch_size=16),
        way(seconds=0.99, place=3),
    ]
    for other in others:
        assert choose([other, plain], lambda _: True) == plain
    assert choose([way(every_blocks=1), others[2]], lambda _: True) == others[2]
    faster = way(seconds=0.9, place=9, every_blocks=1)
    assert choose([plain, faster], lambda _: True) == faster


def test_no_more_is_asked_than_it_takes() -> None:
    asked: list[Way] = []

    def fits(each: Way) -> bool:
        asked.append(each)
        return True

    ways = [way(seconds=1.0 + 0.1 * number) for number in range(9)]
    assert choose(ways, fits) == ways[0]
    assert set(asked) == {ways[0]}
