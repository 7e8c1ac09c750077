"""Pages are handed out once, found again by what they hold, and never lost."""

import random

from mmllm_core.engine.page_pool import PagePool, page_names
from mmllm_core.engine.paged_attention import PAGE


def test_names_tell_all_that_comes_before() -> None:
    first, second = page_names(range(2 * PAGE + 3))
    assert page_names(range(PAGE, 2 * PAGE), first) == [second]
    assert page_names(range(PAGE, 2 * PAGE)) != [second]
    assert page_names(range(PAGE - 1)) == []


def test_what_was_published_is_found_until_its_place_is_needed() -> None:
    pool = PagePool(4)
    names = page_names(range(2 * PAGE))
    taken = pool.take(3, names)
    assert taken is not None
    pages, found = taken
    assert found == 0
    for page, name in zip(pages, names, strict=False):
        pool.publish(page, name)
    pool.release(pages)
    assert pool.n_held == 0
    assert pool.take(3, names) == ([pages[0], pages[1], pool_free_page(pages)], 2)
    assert pool.take(2) is None
    pool.release(pages[:2])
    taken = pool.take(3)
    assert taken is not None  # the named pages had to go
    pool.release(taken[0])
    again = pool.take(2, names)
    assert again is not None
    assert again[1] == 0


def pool_free_page(taken: list[int]) -> int:
    """The page that a pool of four hands out after these three were given back."""
    return taken[2]


def test_a_page_in_use_is_never_handed_out() -> None:
    pool, rng = PagePool(20), random.Random(0)
    held: list[list[int]] = []
    shared: dict[int, int] = {}
    for turn in range(2000):
        if held and rng.random() < 0.5:
            pages = held.pop(rng.randrange(len(held)))
            pool.release(pages)
            for page in pages:
                shared[page] -= 1
            continue
        names = page_names([rng.randrange(2)] * PAGE + list(range(2 * PAGE)))
        taken = pool.take(rng.randrange(1, 6), names)
        if taken is None:
            continue
        pages, found = taken
        assert len(set(pages)) == len(pages)
        assert all(shared.get(page, 0) == 0 for page in pages[found:]), turn
        for page, name in zip(pages, names, strict=False):
            pool.publish(page, name)
        for page in pages:
            shared[page] = shared.get(page, 0) + 1
        held.append(pages)
        assert pool.n_held == sum(n > 0 for n in shared.values())
    for pages in held:
        pool.release(pages)
    assert pool.n_held == 0
    everything = pool.take(20)
    assert everything is not None
    assert sorted(everything[0]) == list(range(20))
