"""A Markov coding game: a message told by the moves of an agent that must also play well.

The sender knows a message, the receiver sees states and moves only. At every step the law of the
move is prescribed by the policy, so that the play is no worse for the message it carries; sender
and receiver couple that law with their common belief about the message and update the belief by
Bayes' rule. (Sokota et al. 2022, with a code of limited rate in between: Ebrahimi et al. 2024.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.information.courier import Link

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Up, right, down, left, as (row, column)."""


@dataclass(frozen=True)
class Grid:
    """A square world. goal pays +1 and trap -1, both end the episode; walls are not entered.

    noise: probability that a move is replaced by a random one. discount: of rewards, a step.
    limit: steps after which an episode ends anyway. Cells are (row, column).
    """

    size: int = 8
    start: tuple[int, int] = (7, 0)
    goal: tuple[int, int] = (0, 7)
    trap: tuple[int, int] = (3, 4)
    walls: tuple[tuple[int, int], ...] = ((2, 2), (5, 2), (2, 5), (5, 5), (4, 1), (6, 6))
    noise: float = 0.1
    discount: float = 0.95
    limit: int = 100

    def cell(self, place: tuple[int, int]) -> int:
        """State number of a place."""
        return place[0] * self.size + place[1]

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p(next | state, move) (s, a, s), reward on entering (s,), and which states end (s,)."""
        n = self.size**2
        reach = np.zeros((n, len(MOVES), n))
        for row in range(self.size):
            for column in range(self.size):
                for a, (down, right) in enumerate(MOVES):
                    to = (row + down, column + right)
                    inside = 0 <= to[0] < self.size and 0 <= to[1] < self.size
                    if not inside or to in self.walls:
                        to = (row, column)
                    reach[self.cell((row, column)), a, self.cell(to)] = 1.0
        moves = (1 - self.noise) * reach + self.noise * reach.mean(axis=1, keepdims=True)
        reward = np.zeros(n)
        reward[self.cell(self.goal)], reward[self.cell(self.trap)] = 1.0, -1.0
        return moves, reward, reward != 0

    def policy(self, beta: float, tolerance: float = 1e-10) -> np.ndarray:
        """The law of the move in each state (s, a): soft value iteration at temperature beta.

        V = beta log sum exp(Q / beta), Q = r + discount E V; the policy is exp((Q - V) / beta).
        """
        if not beta > 0:
            raise NarrowsError(f"temperature beta must be above zero, not {beta!r}")
        moves, reward, ends = self.tables()
        value = np.zeros(len(reward))
        while True:
            q = moves @ (reward + self.discount * np.where(ends, 0.0, value))
            top = q.max(axis=1)
            soft = beta * np.log(np.exp((q - top[:, None]) / beta).sum(axis=1))
            new = top + soft
            if np.abs(new - value).max() < tolerance:
                return np.exp((q - new[:, None]) / beta)
            value = new


@dataclass(frozen=True, slots=True)
class Episode:
    """One play. reward: discounted. right: whether the receiver's best guess was the message.

    belief: what the receiver gave the true message after each step, the prior first.
    """

    reward: float
    right: bool
    belief: tuple[float, ...]


def play(grid: Grid, policy: np.ndarray, prior: np.ndarray, link: Link, seed: int) -> Episode:
    """One episode: message, moves and slips drawn from `seed`, each from a stream of its own.

    Two links played with one seed see the same message and the same slips.
    """
    # spawned in the order message, sender, world: a sender never sees the world's draws
    draw, sender, world = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    moves, reward, ends = grid.tables()
    message = int(draw.choice(len(prior), p=prior))
    belief, state, total = prior, grid.cell(grid.start), 0.0
    seen = [float(prior[message])]
    for step in range(grid.limit):
        table = link(belief, policy[state])
        own = table[message]
        move = int(sender.choice(len(own), p=own / own.sum()))
        # the receiver knows the table (it depends on what both have seen) and the move, no more
        column = table[:, move]
        belief = column / column.sum()
        seen.append(float(belief[message]))
        state = int(world.choice(len(reward), p=moves[state, move]))
        total += grid.discount**step * float(reward[state])
        if ends[state]:
            break
    best = belief.max()
    # among equal beliefs the receiver guesses: counted as right by lot
    tied = np.flatnonzero(belief >= best * (1 - 1e-9))
    return Episode(total, int(world.choice(tied)) == message, tuple(seen))
