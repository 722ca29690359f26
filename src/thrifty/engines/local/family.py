"""The KV memory of a branch and its forks, claimed on their account.

Branches that share segments are one family: what they share counts once. Memory is claimed before it is taken, by an
estimate that is never too small, and set to what is really held after each change; what is claimed is given back when
the last of them is closed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from thrifty.budget import Account

if TYPE_CHECKING:
    from thrifty.engines.local.branch import LocalBranch
    from thrifty.engines.local.engine import LocalEngine


class Family:
    """See the top of the module. `claimed` and `peak` are bytes."""

    def __init__(self, engine: LocalEngine, account: Account) -> None:
        self.engine, self.account = engine, account
        self.members: list[LocalBranch] = []
        self.claimed = 0
        self.peak = 0
        self._lock = threading.Lock()

    def claim(self, nbytes: int) -> None:
        """Takes memory, or raises BudgetExceeded for `kv_bytes_peak`."""
        with self._lock:
            self.account.claim(nbytes)
            self.claimed += nbytes
            self.peak = max(self.peak, self.claimed)

    def join(self, branch: LocalBranch) -> None:
        with self._lock:
            self.members.append(branch)

    def leave(self, branch: LocalBranch) -> None:
        """A closed branch goes; with the last one all memory is given back."""
        with self._lock:
            if branch in self.members:
                self.members.remove(branch)
            if not self.members:
                self.account.claim(-self.claimed)
                self.claimed = 0

    def measure(self) -> None:
        """Sets what is claimed to what is held. On the model's thread. Raises BudgetExceeded."""
        with self._lock:
            if not self.members:
                return
            held = self.engine.runner.nbytes([m.store for m in self.members if m.store is not None])
            self.account.claim(held - self.claimed)
            self.claimed = held
            self.peak = max(self.peak, held)
