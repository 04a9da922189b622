"""What earlier texts of a model taught: its next batch begins with it."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from sirius.core import AUTO, CorrectionConfig, SparsityConfig
from sirius.decoding.lookup import Lookup
from sirius.decoding.period import AutoPeriod, Learnt, Period
from sirius.model.matrix import Placed
from sirius.model.prepare import count_parameters
from sirius.model.prepared import prepared_of
from sirius.runtime.session import Session
from sirius.stats import Parameters, density


@dataclass(frozen=True)
class LearntBefore:
    """The period and the prompt lookup of a configuration, as its earlier texts leave them.

    drafted   the weights of fewer bits that a draft reads, None without such a draft
    compiled  passes are compiled
    """

    session: Session
    sparsity: SparsityConfig
    correction: CorrectionConfig | None
    drafted: Parameters | None
    compiled: bool

    def period(self, placed: Placed | None) -> Period:
        """Return the period.

        placed  tells what passes are expected to take where weights lie elsewhere
        """
        asked = 1 if self.correction is None else self.correction.period
        if asked != AUTO:
            return Period(asked)
        assert self.correction is not None
        known = Learnt.expected(*placed.expected) if placed and placed.expected.draft else Learnt()
        learnt = self._known.setdefault((Learnt, *self._key), known)
        parameters = count_parameters(self.session.model)
        touched = self.session.least_touched()
        floor, probe_share = (density(parameters, each, "streamed", self.drafted) for each in touched)
        own = {"probe_share": probe_share, "width": self.correction.tree_width, "alike": self.drafted is None}
        return AutoPeriod(floor, learnt, **own)

    def lookup(self, rows: int) -> Lookup | None:
        """Return the prompt lookup of batches of so many rows; None where none is asked for."""
        if self.correction is None or not self.correction.draft_ngram:
            return None
        fresh = Lookup(self.correction.draft_ngram, self.correction.longest - 1)
        return self._known.setdefault((Lookup, rows, *self._key), fresh)

    @property
    def _known(self) -> dict[Hashable, Any]:
        return prepared_of(self.session.model).learnt

    @property
    def _key(self) -> tuple[Hashable, ...]:
        here = *self.session.dtype_device, torch.get_num_threads(), self.compiled
        return self.sparsity, self.correction, here
