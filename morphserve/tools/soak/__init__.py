"""Hours of morphing beside a stock server with the same load: what adds up, and whether every answer is right.

`recall` makes a model whose answers are known, `load` sends bursts and keeps the books, `sample` reads what processes
take, `run` brings them together and leaves rows, `judge` holds the rows against what must hold, with `trend` for
slopes, `cli` is the command.
"""

from morphserve.tools.soak.cli import main
from morphserve.tools.soak.load import GIVEN_UP, Ask, Books, draw_burst
from morphserve.tools.soak.recall import answer, make_model

__all__ = ["GIVEN_UP", "Ask", "Books", "answer", "draw_burst", "main", "make_model"]
