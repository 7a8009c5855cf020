"""The mode `average`: all members answer together."""

from __future__ import annotations

from collections.abc import Sequence

from models_store.graphs.runtime import EnsembleSession, Outputs
from service.inference.session import Rows, Settled


class Average:
    """Answers with the weighted mean of all members. A task runs some of the members on all rows."""

    def __init__(self, session: EnsembleSession):
        self._session = session

    def tasks(self, rows: int) -> int:
        """See session.Session."""
        return len(self._session.parts)

    def run(self, task: int, rows: Rows) -> Outputs:
        """See session.Session."""
        return self._session.parts[task].run(rows.images)

    def joined(self, results: Sequence[Outputs]) -> Outputs:
        """See session.Session."""
        return self._session.joined(results)

    def settle(self, rows: Rows, outputs: Outputs) -> Settled:
        """See session.Session."""
        probs = self._session.probs(outputs.logits)
        return Settled(self._session.combine(probs, outputs.novelty), probs, len(probs))
