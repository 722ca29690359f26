"""Thrifty: token budgets for language and vision-language models.

Say what may be spent and what may be lost; a Plan stacks published methods over one budget, and every method's receipt
says whether it fired and what it saved. Importing this package loads no torch, no server, and opens no network.
"""

from thrifty.allocate import allocate
from thrifty.budget import Account, Budget, Hold
from thrifty.call import Answer, Branch, Call, Delta, Draft, Receipt, Sampling, advance
from thrifty.engine import Embeddings, Engine
from thrifty.errors import (
    BudgetExceeded,
    EngineError,
    InvalidInput,
    LedgerError,
    PlanError,
    ThriftyError,
    Unsupported,
)
from thrifty.ledger.entry import Entry, Labels
from thrifty.method import Method, Next, Policies, Rewrite, Search, Whole, knob
from thrifty.plan import Pipeline, Plan
from thrifty.spend import Spend, Work

__version__ = "0.1.0"

__all__ = [
    "Account",
    "Answer",
    "Branch",
    "Budget",
    "BudgetExceeded",
    "Call",
    "Delta",
    "Draft",
    "Embeddings",
    "Engine",
    "EngineError",
    "Entry",
    "Hold",
    "InvalidInput",
    "Labels",
    "LedgerError",
    "Method",
    "Next",
    "Pipeline",
    "Plan",
    "PlanError",
    "Policies",
    "Receipt",
    "Rewrite",
    "Sampling",
    "Search",
    "Spend",
    "ThriftyError",
    "Unsupported",
    "Whole",
    "Work",
    "advance",
    "allocate",
    "knob",
]
