"""Who holds which pages of keys and values, and which pages hold what.

A page that is full of known content is named by a hash of all content up to its end, so that a prompt which begins
alike finds it again, while it is in use or until its place is needed: the page unused longest goes first. Knows numbers
of pages alone, not the memory behind them.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from mmllm_core.engine.paged_attention import PAGE

PageName = bytes


def page_names(keys: Sequence[int], before: PageName = b"") -> list[PageName]:
    """Names of the pages that `keys` fill; what is left over has none.

    Args:
        keys: what stands at each position, 64-bit.
        before: name of the page before the first.
    """
    names = []
    for begin in range(0, len(keys) - PAGE + 1, PAGE):
        before = blake2b(before + array("q", keys[begin : begin + PAGE]).tobytes(), digest_size=16).digest()
        names.append(before)
    return names


class PagePool:
    """Hands out pages and takes them back."""

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self._free = list(range(n_pages))
        self._holders = [0] * n_pages
        self._by_name: dict[PageName, int] = {}
        self._names: dict[int, PageName] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Pages that nobody holds and that may be found again, longest unused first."""

    @property
    def n_held(self) -> int:
        """Pages that somebody holds."""
        return self.n_pages - len(self._free) - len(self._unused)

    def take(self, n: int, names: Sequence[PageName] = ()) -> tuple[list[int], int] | None:
        """Take `n` pages, the first of them those that hold `names` already, as far as they are here.

        Returns:
            The pages, and how many hold what was named; None if there are not enough.
        """
        found: list[int] = []
        for name in names[:n]:
            if (page := self._by_name.get(name)) is None:
                break
            found.append(page)
        n_new = n - len(found)
        if n_new > len(self._free) + len(self._unused) - sum(page in self._unused for page in found):
            return None
        for page in found:
            self._unused.pop(page, None)
            self._holders[page] += 1
        return found + [self._take_one() for _ in range(n_new)], len(found)

    def publish(self, page: int, name: PageName) -> None:
        """Let a page be found by its name; a second page of the same content stays unnamed."""
        if name not in self._by_name and page not in self._names:
            self._by_name[name] = page
            self._names[page] = name

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back, each once for each time that it was taken."""
        for page in reversed(pages):  # so that what comes first, which more prompts begin with, stays longest
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._names:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._by_name[self._names.pop(page)]
        self._holders[page] = 1
        return page
