"""The length predictor: its Gamma against scipy and mpmath, its fit against lengths of a known one, its file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import InvalidInput, PlanError
from thrifty.engines.local import packaged
from thrifty.methods.decode._gamma import fit_gamma, log_gamma_cdf
from thrifty.methods.decode._length_fit import Reads, fit, measure
from thrifty.methods.decode._length_predictor import (
    FILE,
    Config,
    LengthPredictor,
    check_model,
    find,
    fingerprint,
    load,
)

TINY = Config("tiny", width=3, states=2, layers=(1,), vocab=5, boundary="line", hidden=4)


def made(config: Config = TINY, tokens: tuple[int, ...] = (1, 3), seed: int = 0) -> LengthPredictor:
    """A predictor with random weights."""
    at = torch.Generator().manual_seed(seed)
    f, k = config.width * len(config.layers), len(tokens) + 1
    return LengthPredictor(
        config,
        {
            "mean": torch.randn(f, generator=at),
            "scale": torch.rand(f, generator=at) + 0.5,
            "into": torch.randn(config.hidden, f, generator=at),
            "into_bias": torch.randn(config.hidden, generator=at),
            "out": torch.randn(2 * k, config.hidden, generator=at),
            "out_bias": torch.randn(2 * k, generator=at),
            "tokens": torch.tensor(tokens, dtype=torch.long),
        },
    )


# -- the distribution ------------------------------------------------------------------------------------------


@given(st.floats(0.05, 3000), st.floats(1e-4, 5000))
@settings(deadline=None)
def test_the_incomplete_gamma_is_scipys(a: float, x: float) -> None:
    found, expected = float(log_gamma_cdf(a, x)), float(scipy.special.gammainc(a, x))
    assert found <= 0 and math.isfinite(found)
    if expected > 1e-180:
        assert found == pytest.approx(math.log(expected), rel=2e-9, abs=2e-12 if expected < 0.999 else 1e-15)


@pytest.mark.parametrize(("a", "x"), [(400.0, 20.0), (2980.0, 100.0), (2980.0, 700.0), (150.0, 0.7), (900.0, 200.0)])
def test_where_a_float_would_be_zero_it_is_mpmaths(a: float, x: float) -> None:
    with mpmath.workdps(60):
        exact = float(mpmath.log(mpmath.gammainc(a, 0, x, regularized=True)))
    assert exact < -100 and float(log_gamma_cdf(a, x)) == pytest.approx(exact, rel=1e-9)


@given(st.floats(0.1, 2980), st.floats(0.01, 1.0), st.floats(1.0, 1.5))
@settings(deadline=None)
def test_it_never_falls(a: float, share: float, factor: float) -> None:
    """Also across the change from one form to the other."""
    one, two = log_gamma_cdf(torch.tensor([a, a]), torch.tensor([a * share, a * share * factor])).tolist()
    assert two >= one - 1e-9 * abs(one)


@pytest.mark.parametrize(("a", "b"), [(0.7, 2.0), (9.0, 2.0), (300.0, 60.0)])
def test_the_best_gamma_is_scipys(a: float, b: float) -> None:
    drawn = np.random.default_rng(1).gamma(a, 1 / b, size=4000)
    shape, _, scale = scipy.stats.gamma.fit(drawn, floc=0)
    assert fit_gamma(drawn) == pytest.approx((shape, 1 / scale), rel=1e-4)
    for bad in ([], [1.0], [2.0, 2.0], [1.0, 0.0]):
        with pytest.raises(InvalidInput, match="at least two different"):
            fit_gamma(bad)


# -- the network -----------------------------------------------------------------------------------------------


def synthetic(n: int, seed: int) -> tuple[Reads, Any]:
    """Two kinds of place, told apart by the features, and two tokens: four Gammas. Returns the true (a, b) too."""
    rng = np.random.default_rng(seed)
    kind, token = rng.integers(0, 2, n), rng.integers(1, 3, n)
    a = np.where(token == 1, 40.0, 90.0)
    mean = np.where(kind == 0, 3.0, 4.5) + np.where(token == 1, 0.0, 0.6)
    y = rng.gamma(a, mean / a)
    features = rng.normal(size=(n, 3)) * 0.1 + kind[:, None] * np.array([1.0, -2.0, 0.5])
    return Reads(features, token, np.exp(y)), (a, a / mean)


@pytest.fixture(scope="module")
def fitted() -> LengthPredictor:
    return fit(synthetic(6000, 1)[0], synthetic(1000, 2)[0], replace(TINY, hidden=16), epochs=20, rate=1e-2, batch=512)


def test_lengths_of_a_known_gamma_pass_a_test_of_the_fitted_one(fitted: LengthPredictor) -> None:
    """Kolmogorov and Smirnov: the predicted chances of what was drawn are uniform; those of a constant are not."""
    drawn, (a, b) = synthetic(1500, 3)
    nll, chances = measure(fitted, drawn)
    assert scipy.stats.kstest(chances.numpy(), "uniform").pvalue > 0.01
    best = -scipy.stats.gamma.logpdf(drawn.logs.numpy(), a, scale=1 / b)
    assert float(nll.mean()) == pytest.approx(best.mean(), abs=0.02) and float(nll.mean()) > best.mean() - 0.02
    flat_a, flat_b = fit_gamma(drawn.logs)
    flat = -scipy.stats.gamma.logpdf(drawn.logs.numpy(), flat_a, scale=1 / flat_b)
    assert float(nll.mean()) < flat.mean() - 0.3
    for token in (1, 2):  # each token's own, too
        part = drawn.tokens == token
        assert scipy.stats.kstest(chances[part].numpy(), "uniform").pvalue > 0.01


def test_the_shared_gamma_is_that_of_whatever_comes_next(fitted: LengthPredictor) -> None:
    """A token that was never seen is judged by the place: its predicted mean is the mean over the tokens there."""
    for kind, mean in ((0, 3.3), (1, 4.8)):
        hidden = torch.stack([torch.zeros(3), kind * torch.tensor([1.0, -2.0, 0.5])])
        a, m = fitted.gammas(fitted.features(hidden))
        rows = fitted.rows
        assert rows[0] == rows[4] == 2 and rows[1] == 0 and rows[2] == 1
        assert float(m[2]) == pytest.approx(mean, abs=0.1)
        assert float(m[0]) == pytest.approx(mean - 0.3, abs=0.1) and float(m[1]) == pytest.approx(mean + 0.3, abs=0.1)
        chances = torch.tensor([0.0, 0.25, 0.75, 0.0, 0.0])
        assert fitted.expected(hidden, chances) == pytest.approx(math.exp(mean + 0.15), rel=0.1)


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    (train, _), (stop, _) = synthetic(400, 1), synthetic(100, 2)
    files = [tmp_path / name for name in ("a", "b", "c")]
    digests = [fit(train, stop, TINY, epochs=2, seed=seed).save(f) for seed, f in zip((0, 0, 1), files, strict=True)]
    assert files[0].read_bytes() == files[1].read_bytes() and digests[0] == digests[1] != digests[2]


@given(st.integers(0, 50), st.lists(st.integers(2, 5000), min_size=2, max_size=6))
@settings(deadline=None)
def test_the_factor_is_a_chance_that_grows_with_the_budget(seed: int, budgets: list[int]) -> None:
    predictor, hidden = made(seed=seed), torch.randn(2, 3, generator=torch.Generator().manual_seed(seed + 1))
    shape, mean = predictor.gammas(predictor.features(hidden))
    rows = [2, 0, 2, 1, 2]
    last = torch.full((5,), -math.inf)
    for left in sorted(budgets):
        log = predictor.log_factor(hidden, left)
        chances = [
            scipy.special.gammainc(float(shape[r]), float(shape[r] / mean[r]) * math.log(max(left, 2))) for r in rows
        ]
        assert log.exp().tolist() == pytest.approx(chances, rel=1e-7, abs=1e-12)
        assert bool(log.isfinite().all()) and bool((log <= 0).all()) and bool((log >= last - 1e-9).all())
        last = log
    assert torch.equal(predictor.log_factor(hidden, math.inf), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(predictor.log_factor(hidden, 1), predictor.log_factor(hidden, 2))  # ln 1 would have no chance


def test_it_reads_the_layers_that_it_was_trained_on() -> None:
    hidden = torch.arange(6.0).view(2, 3)
    assert made().features(hidden).tolist() == [3, 4, 5]
    both = made(replace(TINY, layers=(0, 1)))
    assert both.features(hidden.bfloat16()).tolist() == [0, 1, 2, 3, 4, 5]
    for wrong in (torch.zeros(3, 3), torch.zeros(2, 4)):
        with pytest.raises(InvalidInput, match="trained on hidden states"):
            made().features(wrong)


# -- the file --------------------------------------------------------------------------------------------------


def test_the_file_holds_all_of_it(tmp_path: Path) -> None:
    predictor, file = made(replace(TINY, fingerprint=(0.5, -1.25), traces=7)), tmp_path / "p.safetensors"
    digest = predictor.save(file)
    again, hidden = load("me", file), torch.randn(2, 3)
    assert again.config == predictor.config and again.digest == digest
    assert torch.equal(again.log_factor(hidden, 40), predictor.log_factor(hidden, 40))
    assert load("me", file, digest[:6].upper()).digest == digest
    with pytest.raises(InvalidInput, match="knob sha256 says 'beef'"):
        load("me", file, "beef")


@pytest.mark.parametrize("bad", ["missing", "text", "other", "shape", "layers", "vocabulary", "boundary"])
def test_what_is_no_predictor_is_refused_in_one_line(tmp_path: Path, bad: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "p.safetensors"
    if bad == "text":
        file.write_text("hello")
    elif bad == "other":
        save_file({"x": torch.zeros(1)}, str(file))
    elif bad != "missing":
        predictor = made()
        if bad == "shape":
            predictor.tensors["out"] = torch.zeros(3, 4)
        if bad == "vocabulary":
            predictor.tensors["tokens"] = torch.tensor([1, 9])
        broken = {"layers": {"layers": (7,)}, "boundary": {"boundary": "("}}.get(bad, {})
        predictor.save(file)
        if broken:
            text = file.read_bytes()
            old, new = {"layers": (b"[1]", b"[7]"), "boundary": (b"line", b"(ne)+(")}[bad]
            size = int.from_bytes(text[:8], "little")
            head = text[8 : 8 + size].replace(old, new, 1).rstrip()
            head += b" " * (-len(head) % 8)
            file.write_bytes(len(head).to_bytes(8, "little") + head + text[8 + size :])
    with pytest.raises(InvalidInput, match=r"^me: .*p\.safetensors: ") as refused:
        load("me", file)
    assert "\n" not in str(refused.value)


def test_a_file_is_found_by_path_or_by_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / FILE
    file.touch()
    assert find("me", str(file), "any") == file
    model = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(packaged, "MODELS", {"small": model})
    assert find("me", "small", "any") == find("me", "", "small") == file
    file.unlink()
    for predictor, model_name in (("small", ""), ("", "small"), ("", "other"), ("", ""), ("nowhere", "small")):
        with pytest.raises(PlanError, match=r"recipes/budget_guidance/train\.py") as refused:
            find("me", predictor, model_name)
        assert "\n" not in str(refused.value)


def test_a_predictor_of_another_model_is_refused() -> None:
    def engine(seed: int, width: int = 3, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(5, width), torch.nn.Linear(width, 40)).to(dtype)
        runner = SimpleNamespace(model=model, config=SimpleNamespace(hidden_size=width), layers=1, vocab=5)
        return SimpleNamespace(runner=runner, model=f"model{seed}")

    mine = engine(1)
    predictor = made(replace(TINY, fingerprint=fingerprint(mine.runner.model)))
    check_model("me", predictor, mine)
    check_model("me", predictor, engine(1, dtype=torch.bfloat16))  # the same weights as a plan may load them
    check_model("me", predictor, SimpleNamespace(model="remote"))
    for other in (engine(2), engine(1, width=4)):
        with pytest.raises(PlanError, match=r"trained on model tiny .* and the plan runs model") as refused:
            check_model("me", predictor, other)
        assert "\n" not in str(refused.value)
    check_model("me", made(), engine(2))  # without a fingerprint the sizes alone are compared
    nearly = engine(1)
    with torch.no_grad():
        nearly.runner.model[1].weight.mul_(1.05)
    with pytest.raises(PlanError, match="other weights"):
        check_model("me", predictor, nearly)


def test_what_cannot_be_learned_from_is_refused() -> None:
    for features, tokens, left in (
        (torch.zeros(2, 3), [1], [4]),
        (torch.zeros(3), [1], [4]),
        (torch.zeros(0, 3), [], []),
    ):
        with pytest.raises(InvalidInput, match="a row each"):
            Reads(features, tokens, left)
    same = Reads(torch.zeros(4, 3), [1] * 4, [9] * 4)
    with pytest.raises(InvalidInput, match="at least two different"):
        fit(same, same, TINY)
