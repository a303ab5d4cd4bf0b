"""A game of one's own that has no grid: guess a number, at most eight turns. Used by the tests."""

import re

from oel_jax import environments


class Guess:
    """The number is 1 to 99; the answer to each guess is higher, lower or right."""

    name = "guess"

    def __init__(self, seed, layout="released"):
        self.seed, self.turns, self.passed = seed, 0, False
        self._secret = seed // 1000 % 99 + 1
        self._news = "Guess a number from 1 to 99, as [50]. After each guess you are told more."
        self._history = self._news

    @property
    def done(self):
        return self.passed or self.turns == 8

    def situation(self):
        return self._history + "\n"

    def observation(self):
        return self._news

    def step(self, response):
        found = re.findall(r"\[(\d+)\]", response)
        self.turns += 1
        guess = int(found[-1]) if found else 0
        self.passed = guess == self._secret
        self._news = f"{guess}: {'right' if self.passed else 'too ' + 'lh'[guess > self._secret]}"
        self._history += "\n" + self._news
        return f"[{guess}]"

    def outcome(self):
        return f"Summary:\nFinal Result: {'Success' if self.passed else 'Failure'}\n"

    def board_id(self):
        return str(self._secret)


environments.register("guess", Guess)
