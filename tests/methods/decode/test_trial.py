"""A watcher rides on a probe's fork alone, sees its tokens, may end it, and needs logits where it asks for them."""

from __future__ import annotations

from typing import Any

import pytest

from thrifty import Account, Call, Unsupported
from thrifty.call import Branch
from thrifty.engines.scripted import Reply, ScriptedEngine
from thrifty.methods.decode._trial import Trial
from thrifty.policy import CONTINUE, DecodePolicy, Probe, Stop, Verdict

ASK = ({"role": "user", "content": "Why?"},)


class Watcher(DecodePolicy):
    """Ends the probe at its second token."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def fork(self) -> Watcher:
        return self

    def after(self, branch: Branch, token: int) -> Verdict:
        self.seen.append(branch.codec.decode([token]).strip())  # type: ignore[attr-defined]
        return Stop() if len(self.seen) == 2 else CONTINUE


class Ask(DecodePolicy):
    """Probes after the first token."""

    method = "ask"

    def __init__(self, watch: DecodePolicy) -> None:
        self._watch = watch
        self.heard: list[str] = []

    def fork(self) -> Ask:
        return self

    def after(self, branch: Branch, token: int) -> Verdict:
        if len(branch.tokens) != 1:
            return CONTINUE

        def then(said: str) -> Verdict:
            self.heard.append(said)
            return CONTINUE

        return Probe(" So: ", 9, then, self._watch)


def script(call: Call, draw: Any) -> Reply:
    return Reply("one two three four" if (call.prefix or "").endswith("So: ") else "a b c")


async def test_it_sees_the_probe_alone_and_its_stop_ends_it() -> None:
    engine = ScriptedEngine(script)
    watch = Watcher()
    ask = Ask(watch)
    answer = await engine.generate(Call(ASK, Account("t"), policies=(ask,)))
    assert answer.text == "a b c" and watch.seen == ["one", "two"] and ask.heard == ["one two"]
    assert answer.receipts[0].spend.output == 2 + 2  # the cue, and the two tokens up to the stop


async def test_on_a_model_too(thinker: Any) -> None:
    watch, trial = Watcher(), Trial(lambda z: float(z.shape[-1]))
    for one in (watch, trial):
        ask = Ask(one)
        await thinker.generate(Call(ASK, Account("t"), policies=(ask,)).with_sampling(max_tokens=4))
        assert len(ask.heard) == 1
    assert len(watch.seen) == 2 and set(trial.values) == {320.0} and 1 <= len(trial.values) <= 9


async def test_a_watcher_of_logits_is_refused_where_there_are_none() -> None:
    with pytest.raises(Unsupported, match="no logits for Trial"):
        await ScriptedEngine(script).generate(Call(ASK, Account("t"), policies=(Ask(Trial(lambda z: 0.0)),)))
