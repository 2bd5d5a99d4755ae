"""How many threads share a step: all, or half of them while other programs take cores.

Threads that share a step wait for each other some tens of times in it. Where another program takes a core, they wait
for the thread that has lost it, and one thread alone may be quicker than two. Nobody says when that is so; it shows in
the time that steps take.
"""

from __future__ import annotations

import logging
from math import inf

log = logging.getLogger("digit")

WINDOW, TRIAL = 16, 8  # steps: that are averaged; with another number of threads
STAY, LONGEST = 32, 512  # steps with fewer threads before all are tried again: at first, and after several such trials
DISTURBED = 1.7  # times the quickest window; longer sequences alone make a step up to 1.4 times as long


class Team:
    """The number of threads of the next step, from how long the last ones took.

    Attributes:
        count: threads of the next step.
        window: steps that should follow with so many.
        most: threads where nothing disturbs.
    """

    def __init__(self, most: int) -> None:
        self.most = self.count = most
        self.window = self._whole = WINDOW
        self._fewer, self._stay, self._seconds = max(1, most // 2), STAY, 0.0
        self._usual, self._means = inf, {self._fewer: inf, most: inf}

    def took(self, steps: int, seconds: float) -> None:
        """Tell how long some steps took, at most ``window``."""
        self.window -= steps
        self._seconds += seconds
        if self.window > 0:
            return
        mean = self._means[self.count] = self._seconds / self._whole
        self._seconds = 0.0
        if self.most == 1:
            self._go_on(1, WINDOW)
        elif self.count == self.most:
            known, self._usual = self._usual, min(self._usual, mean)
            if self._means[self._fewer] < inf:
                self._decide()
            elif known == inf or mean > DISTURBED * known:  # at first nobody knows whether something disturbs
                self._go_on(self._fewer, TRIAL)
            else:
                self._go_on(self.most, WINDOW)
        elif self._whole == TRIAL:
            self._decide()
        else:
            self._go_on(self.most, TRIAL)

    def _decide(self) -> None:
        if self._means[self._fewer] > self._means[self.most]:
            self._stay = STAY
            self._go_on(self.most, WINDOW)
            return
        log.info("Other programs take the processor: steps run in %d of %d threads.", self._fewer, self.most)
        self._go_on(self._fewer, self._stay)
        self._stay = min(2 * self._stay, LONGEST)

    def _go_on(self, count: int, steps: int) -> None:
        self.count, self.window, self._whole = count, steps, steps
        if count == self.most and steps != TRIAL:  # what fewer threads took is not asked any more
            self._means[self._fewer] = inf
