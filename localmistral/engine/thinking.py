"""A limit on how long a model thinks: when it is spent, the thinking is closed for the model.

Works on token ids alone; knows nothing of templates or of how thinking is shown.
"""

from collections.abc import Sequence


class ThinkingBudget:
    """Counts the tokens between `open_token` and `close_token`; serves one request.

    After `budget` of them it writes `closing` (a short sentence, say) and `close_token`, once per
    thinking. `is_open` says that the prompt has begun the thinking already.
    """

    def __init__(
        self,
        *,
        open_token: int,
        close_token: int,
        budget: int,
        closing: Sequence[int] = (),
        is_open: bool = False,
    ) -> None:
        self._open_token = open_token
        self._close_token = close_token
        self._budget = budget
        self._closing = tuple(closing)
        self._is_open = is_open
        self._spent = 0

    def follow(self, token: int) -> Sequence[int]:
        """The tokens to write after `token`; see `settings.Guide`."""
        if token == self._open_token:
            self._is_open, self._spent = True, 0
        elif token == self._close_token:
            self._is_open = False
        elif self._is_open:
            self._spent += 1
        if not self._is_open or self._spent < self._budget:
            return ()
        self._is_open = False
        return (*self._closing, self._close_token)
