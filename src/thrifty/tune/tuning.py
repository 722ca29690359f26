"""The whole job of `thrifty tune`: a plan whose loss is bounded, and the certificate that says so.

    tuned = await tune(split(tasks), space, engines, Claim("drop", 0.05, 0.1, bound="betting"), "out/tune")

Search on one part of the examples, freeze what is to be tested, open the calibration part (one counted use), test in
the frozen order until the first plan that fails, and report the loss of what was certified on the third part.

Invariants: nothing is run before the claim, the parts and the space are checked; no calibration example is run before
what it tests is frozen and on disk and the use is counted; a plan is tested on all examples of the part or not at all;
the account is never passed, and what was certified before it stopped the run stays certified, since a fixed sequence
may end anywhere for reasons that are no losses. A second run in the same folder goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.bench.head import changed_settings
from thrifty.bench.key import digest, identities
from thrifty.bench.run import GREEDY
from thrifty.bench.scorers import checked
from thrifty.bench.scoring import Score
from thrifty.bench.store import Store
from thrifty.bench.task import Task
from thrifty.budget import Account, Budget
from thrifty.call import Answer, Sampling
from thrifty.engine import Engine
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.ledger.chain import Key
from thrifty.plan import Plan
from thrifty.tune import crc
from thrifty.tune.bounds import p_value
from thrifty.tune.calibration import Calibration, Claim, Reuse, Use, UseLog, default_log
from thrifty.tune.certificate import Certificate, Figure, Saving, SplitUsed, issue, write_whole
from thrifty.tune.feasible import check, forecast, needed_for, size_of
from thrifty.tune.found import Found, Settings
from thrifty.tune.frozen import Frozen, freeze, load, request_of
from thrifty.tune.ltt import fixed_sequence
from thrifty.tune.paired import Part
from thrifty.tune.saving import beside, figure, naive_grid, saving_of
from thrifty.tune.search import search
from thrifty.tune.space import Space
from thrifty.tune.splits import Splits, data_hash
from thrifty.tune.tuned import CERTIFICATE, PLAN, RESULTS, SEARCH, Test, Tuned

SEARCH_SHARE = 0.5
"""Of a limited account, what the search may take: the test needs the rest."""


async def tune(
    splits: Splits,
    space: Space | Sequence[Plan],
    engines: Mapping[str, Engine] | Engine,
    claim: Claim,
    out: str | Path,
    *,
    settings: Settings | None = None,
    reference: Plan | None = None,
    account: Account | None = None,
    sampling: Sampling = GREEDY,
    log: UseLog | None = None,
    reuse: Reuse = "refuse",
    split_used: SplitUsed | None = None,
    key: Key | None = None,
    score: Score | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Tuned:
    """Tunes, and writes search.json, results.jsonl and, when a plan is certified, certificate.json and plan.toml.

    `settings`: how to search. `reference`: what is compared with, by default the engine without any method. `log`:
    where uses of calibration examples are counted. `split_used`: how the parts were cut from one file, for `verify`.
    `key` signs the certificate. `tell` is given lines for people. `options` go to the bench's `run` (concurrency,
    command, watcher, unsafe, fleet).

    Raises InvalidInput for what cannot be checked or certified as asked, before anything is spent where it can be known
    before; PlanError for a space with no plan that the engines can run; EngineError when an engine fails.
    """
    given = dict(engines) if isinstance(engines, Mapping) else {"answer": engines}
    how = settings or Settings()
    base = reference or _plain(space)
    base.build(given)
    if claim.loss == "disagree":
        sampling = _deterministic(sampling)
    check(splits, space, claim, reuse)
    if (warning := forecast(splits, claim)) is not None:
        tell(warning)
    size = size_of(space, base, given, how)
    folder = Path(out)
    run = _Run(
        splits=splits,
        engines=given,
        claim=claim,
        folder=folder,
        settings=how,
        account=account or Account("tune"),
        sampling=sampling,
        log=log or UseLog(default_log()),
        reuse=reuse,
        split_used=split_used,
        key=key,
        tell=tell,
        options=dict(options) if score is None else {**options, "score": _checked(score)},
    )
    with Store(folder / RESULTS) as store:
        return await run.work(store, space, base, size)


@dataclass(kw_only=True)
class _Run:
    splits: Splits
    engines: Mapping[str, Engine]
    claim: Claim
    folder: Path
    settings: Settings
    account: Account
    sampling: Sampling
    log: UseLog
    reuse: Reuse
    split_used: SplitUsed | None
    key: Key | None
    tell: Callable[[str], None]
    options: Mapping[str, Any]

    async def work(self, store: Store, space: Space | Sequence[Plan], base: Plan, size: int) -> Tuned:
        """Search, test, report."""
        self.store, self.base = store, base
        frozen = await self._frozen(space, size)
        tuned = Tuned(frozen=frozen, splits=self.splits, stopped=frozen.found.get("stopped"))
        if frozen.order:
            tuned = await self._test(tuned)
        else:
            tuned = dataclasses.replace(tuned, needed=_no_candidate(frozen))
        if tuned.plan is not None and tuned.use is not None:
            tuned = await self._certify(tuned, tuned.plan, tuned.use)
        files = {RESULTS: self.folder / RESULTS, SEARCH: self.folder / SEARCH}
        if tuned.certificate is not None:
            files |= {PLAN: self.folder / PLAN, CERTIFICATE: self.folder / CERTIFICATE}
        paid, naive = naive_grid(store, self.splits, size)
        return dataclasses.replace(tuned, paid=paid, naive=naive, files=files)

    # -- search --------------------------------------------------------------------------------------------------

    async def _frozen(self, space: Space | Sequence[Plan], size: int) -> Frozen:
        where = space.hash if isinstance(space, Space) else digest(sorted(plan.hash for plan in space))
        data = [data_hash(part) if part else "" for part in self.splits.parts().values()]
        roles = {role: dict(engine.identity()) for role, engine in self.engines.items()}
        how = changed_settings(self.sampling)
        request = request_of(self.base, where, data, self.settings, self.claim, roles, how)
        path = self.folder / SEARCH
        known = load(path)
        if known is not None and known.opened:
            if known.request != request:
                raise InvalidInput(
                    f"{path}: calibration examples were opened here for another search, claim, engine or data: give "
                    "another --out"
                )
            self.tell(f"search: frozen before, {len(known.order)} plans to test")
            return known
        found = await self._search(space)
        self.tell(f"search: {found.how}, {found.tried} plans tried" + (" (stopped)" if found.stopped else ""))
        part = self._part("search", self.splits.search, self.account)
        plans = [plan for plan in found.order if plan.hash != self.base.hash]
        known_losses = ((plan.hash, part.losses(self.claim.loss, plan, self.base)) for plan in plans)
        losses = {name: each for name, each in known_losses if each.n}
        frozen = freeze(found, self.claim, request, losses, size)
        self._check_values(part, plans)
        frozen.save(path)
        for name, why in frozen.left_out:
            self.tell(f"not tested: {name}: {why}")
        return frozen

    async def _search(self, space: Space | Sequence[Plan]) -> Found:
        limits = {name: _part(left, SEARCH_SHARE) for name, left in self.account.remaining().items()}
        child = self.account.child("search", Budget(**limits))  # type: ignore[arg-type]  # whole but for seconds
        return await search(
            space,
            self.splits.search,
            self.engines,
            self.store,
            self.settings,
            reference=self.base,
            account=child,
            sampling=self.sampling,
            keep_text=True,
            **self.options,
        )

    def _check_values(self, part: Part, plans: Sequence[Plan]) -> None:
        """Clopper-Pearson asks for losses of 0 and 1: where the search has seen another, no use is spent on it."""
        if self.claim.bound != "clopper-pearson" or self.claim.loss != "error":
            return
        for plan in (self.base, *plans):
            odd = next((r for r in part.results(plan) if r.score not in (0, 1)), None)
            if odd is not None:
                raise InvalidInput(
                    f"clopper-pearson is exact for losses of 0 and 1, and example {odd.task!r} scored {odd.score:g}: "
                    "use the bound betting"
                )

    # -- test ----------------------------------------------------------------------------------------------------

    async def _test(self, tuned: Tuned) -> Tuned:
        """Opens the calibration part and tests what was frozen."""
        frozen, path = tuned.frozen, self.folder / SEARCH
        if frozen.found.get("stopped") is not None and not frozen.opened and self._nothing_left():
            return dataclasses.replace(tuned, needed=None)  # a use would be spent for nothing
        frozen.with_opened(True).save(path)
        try:
            tasks, use = Calibration(self.splits.calibration, self.log, reuse=self.reuse).open(frozen.hash, self.claim)
        except ThriftyError:
            frozen.save(path)
            raise
        self.tell(f"calibration: {use}")
        part = self._part("calibration", tasks, self.account)
        tuned = dataclasses.replace(tuned, frozen=frozen.with_opened(True), use=use)
        if self.claim.procedure == "conformal-risk-control":
            return await self._control(tuned, part)
        return await self._sequence(tuned, part, use)

    async def _sequence(self, tuned: Tuned, part: Part, use: Use) -> Tuned:
        """Fixed-sequence testing: one plan at a time, up to the first that fails."""
        bound, delta = self.claim.bound, use.delta
        assert bound is not None and delta is not None  # a Claim of learn-then-test has both
        tests: list[Test] = []
        stopped = None
        with_base = self.claim.loss != "error" or not self.splits.holdout
        for each in tuned.frozen.order:
            stopped = await part.run([each] if each.hash == self.base.hash or not with_base else [self.base, each])
            if stopped is not None:
                break
            losses = part.losses(self.claim.loss, each, self.base)
            p = p_value(bound, losses, self.claim.alpha)
            tests.append(Test(each, losses, p, certified=p <= delta))
            self.tell(f"tested: {each.name}: mean loss {losses.mean:.4g} on {losses.n} groups, p value {p:.3g}")
            if p > delta:
                break
        certified = fixed_sequence([test.p_value or 0.0 for test in tests], delta)
        # The last of the frozen order is the cheapest on the search examples: chosen without a look at these costs.
        plan = tests[certified - 1].plan if certified else None
        needed = None if plan is not None or not tests else needed_for(self.claim, delta, tests[0].losses)
        return dataclasses.replace(
            tuned, tests=tuple(tests), plan=plan, needed=needed, stopped=stopped or tuned.stopped
        )

    async def _control(self, tuned: Tuned, part: Part) -> Tuned:
        """Conformal risk control over the settings of one knob. Which are there may depend on the budget, never on
        losses, and the safer ones stay controlled without the cheaper."""
        stopped = await part.run([self.base]) if self.claim.loss != "error" else None
        columns: list[Plan] = [self.base] if self.claim.loss != "error" and stopped is None else []
        for each in tuned.frozen.order:
            stopped = stopped or await part.run([each] if each.hash == self.base.hash else [self.base, each])
            if stopped is not None:
                break
            columns.append(each)
        if not columns or columns == [self.base] and stopped is not None:
            return dataclasses.replace(tuned, stopped=stopped)
        losses = [part.losses(self.claim.loss, column, self.base) for column in columns]
        table = np.stack([each.values for each in losses], axis=1)
        found = crc.conformal_risk_control(table, self.claim.alpha, losses[0].low, losses[0].high)
        last = -1 if found.index is None else found.index
        tests = tuple(
            Test(column, its, corrected=float(found.corrected[i]), certified=i <= last)
            for i, (column, its) in enumerate(zip(columns, losses, strict=True))
        )
        plan: Plan | None = columns[last] if last >= 0 else None
        if plan is not None and plan.hash == self.base.hash and self.claim.loss != "error":
            plan = None  # the reference, which loses nothing against itself
        nearest = next((t for t in tests if t.plan.hash != self.base.hash or self.claim.loss == "error"), tests[0])
        needed = None if plan is not None else needed_for(self.claim, None, nearest.losses)
        return dataclasses.replace(tuned, tests=tests, plan=plan, needed=needed, stopped=stopped or tuned.stopped)

    # -- the certificate -----------------------------------------------------------------------------------------

    async def _certify(self, tuned: Tuned, plan: Plan, use: Use) -> Tuned:
        """Runs the third part, and writes certificate and plan."""
        parts = [self._part("calibration", self.splits.calibration, self.account)]
        holdout: Figure | None = None
        stopped = tuned.stopped
        if self.splits.holdout:
            third = self._part("holdout", self.splits.holdout, self.account)
            stop = await third.run([self.base] if plan.hash == self.base.hash else [self.base, plan])
            if stop is None:
                parts.append(third)
                holdout = figure(third.losses(self.claim.loss, plan, self.base), self.settings.seed)
            else:
                self.tell(f"holdout: not measured, {stop}")
                stopped = stopped or stop
        compared = beside(parts, plan, self.base, self.settings.seed) if plan.hash != self.base.hash else None
        saving: Saving | None = None if compared is None else saving_of(compared, self.settings.axis)
        made = issue(
            plan=plan,
            reference=self.base,
            search_hash=tuned.frozen.hash,
            order=[each.hash for each in tuned.frozen.order],
            use=use,
            tested=[(test.plan, test.losses) for test in tuned.tests],
            engines=identities(plan, self.engines),
            split=self.split_used,
            holdout=holdout,
            saving=saving,
        )
        made = self._kept(made)
        if self.key is not None and made.verify_signature(self.key) is not True:
            made = made.sign(self.key)
        made.save(self.folder / CERTIFICATE)
        write_plan(self.folder / PLAN, made)
        return dataclasses.replace(tuned, certificate=made, beside=compared, stopped=stopped)

    def _kept(self, made: Certificate) -> Certificate:
        """The certificate that is there already, where it says the same: its hash is what a revocation names."""
        path = self.folder / CERTIFICATE
        if not path.exists():
            return made
        old = Certificate.load(path)
        same = dataclasses.replace(made, date=old.date, versions=old.versions)
        return old if same.hash == old.hash else made

    # -- details -------------------------------------------------------------------------------------------------

    def _part(self, name: str, tasks: Sequence[Task], account: Account) -> Part:
        return Part(name, tasks, self.engines, self.store, account, self.sampling, self.settings.seed, self.options)

    def _nothing_left(self) -> bool:
        return any(left <= 0 for left in self.account.remaining().values())


def write_plan(path: Path, certificate: Certificate) -> None:
    """The certified plan as TOML, under a comment that says what it is. Raises ThriftyError."""
    write_whole(path, f"# {certificate.statement()}\n{certificate.plan_toml}".encode())


def _no_candidate(frozen: Frozen) -> str:
    """Why nothing was tested. The calibration examples were not used."""
    if frozen.left_out:
        name, why = frozen.left_out[0]
        told = f"{name} {why}"
        return f"no plan was worth testing, and the calibration examples are unused: {told}"
    if not frozen.found.get("order"):
        return "the search was stopped before any plan had a result; the calibration examples are unused"
    return (
        "no plan that was tried spends less than the reference and is not beaten by it; the calibration examples are "
        "unused"
    )


def _plain(space: Space | Sequence[Plan]) -> Plan:
    if isinstance(space, Space):
        return Plan("reference", engines=dict(space.engines), on_exceed=space.on_exceed)
    return Plan("reference")


def _deterministic(sampling: Sampling) -> Sampling:
    if sampling.temperature:
        raise InvalidInput(
            f"loss disagree at temperature {sampling.temperature:g}: the reference would differ from itself; use "
            "temperature 0, or the loss drop"
        )
    return dataclasses.replace(sampling, temperature=0.0)


def _part(left: float, share: float) -> float:
    return int(left * share) if isinstance(left, int) else left * share


def _checked(score: Score) -> Score:
    """The same, refusing what is no number in [0, 1], with the example's name."""

    async def safe(task: Task, answer: Answer, engines: Mapping[str, Engine], account: Account) -> float:
        try:
            return checked(await score(task, answer, engines, account), "given")
        except InvalidInput as error:
            raise InvalidInput(f"example {task.id!r}: {error}") from error

    return safe
