"""What the tasks of a run tell each other in a round."""

from __future__ import annotations

from typing import Any

from sparktf.program.board import DONE, Board
from sparktf.transport import Communicator
from sparktf.transport.testing import results_of_threads, run_threads


def test_an_exchange_is_complete_for_all_members_in_the_round_after_the_last_post() -> None:
    def tell(communicator: Communicator) -> list[Any]:
        board, taken = Board(communicator), []
        # Rank 2 is no member, rank 1 comes a round later than rank 0.
        for number in range(3):
            if number == communicator.rank < 2:
                board.post("names", f"rank {communicator.rank}".encode(), (0, 1))
            board.round()
            taken.append(board.take("names"))
        board.mine.state = DONE
        return [taken, [notice.state for notice in board.round()]]

    outcomes = run_threads("tcp", 3, tell)
    whole = [b"rank 0", b"rank 1"]
    assert [taken for taken, _ in outcomes] == [[None, whole, None], [None, whole, None], [None, None, None]]
    assert all(states == [DONE] * 3 for _, states in outcomes)


def test_a_post_is_news_until_the_next_round() -> None:
    def tell(communicator: Communicator) -> list[bool]:
        board = Board(communicator)
        news = [board.news]
        if communicator.rank == 0:
            board.post("names", b"rank 0", (0, 1))
        news.append(board.news)
        # The exchange is not complete: waiting for it must not make the rounds follow each other without a pause.
        board.round()
        return [*news, board.news]

    assert results_of_threads("tcp", 2, tell) == [[False, True, False], [False, False, False]]
