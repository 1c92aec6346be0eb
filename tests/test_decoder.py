from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoder import Model, kernels, product

ZERO = {"avx512": 128, "avx2": 64, "portable": 128}
"""Zero point of quantised activations; their largest magnitude is one less."""
WIDTH, HEADS, FFN, LAYERS, SIZES, PROMPT = 48, 3, 80, 2, (7, 40, 3), 11
PRODUCTS = [(WIDTH, WIDTH)] * 6 + [(FFN, WIDTH), (WIDTH, FFN)]


@pytest.mark.parametrize("name", kernels())
@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 7),
    k=st.integers(1, 9),
    extreme=st.booleans(),
    seed=st.integers(0, 9),
)
def test_integer_products_are_exact_at_every_shape_and_extreme(name, rows, n, k, extreme, seed):
    rng, top = np.random.default_rng(seed), 2 * ZERO[name]
    values = rng.choice([1, top - 1], (rows, 16 * k)) if extreme else rng.integers(1, top, (rows, 16 * k))
    weight = rng.choice([-127, 127], (16 * n, 16 * k)) if extreme else rng.integers(-127, 128, (16 * n, 16 * k))
    found = product(values.astype(np.uint8), weight.astype(np.int8), name)
    np.testing.assert_array_equal(found, (values - ZERO[name]) @ weight.T)


def random_parts(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    def norm():
        return np.stack([1 + 0.2 * normal(WIDTH), 0.2 * normal(WIDTH)])

    layers = [
        (
            [
                (
                    rng.integers(-127, 128, shape).astype(np.int8),
                    0.004 * (1 + rng.random(shape[0], np.float32)),
                    normal(shape[0]),
                )
                for shape in PRODUCTS
            ],
            [norm() for _ in range(3)],
        )
        for _ in range(LAYERS)
    ]
    codes, size = sum(SIZES), WIDTH // HEADS
    context = [normal(HEADS, *shape) for _ in range(LAYERS) for shape in ((size, PROMPT), (PROMPT, size))]
    bias = np.where(np.arange(PROMPT) == 4, np.float32(-1e9), np.float32(0))
    return SimpleNamespace(
        layers=layers,
        embeddings=normal(1 + codes, WIDTH),
        positions=normal(len(SIZES), WIDTH),
        norm=norm(),
        head_bias=normal(codes),
        context=context,
        bias=bias,
    )


def native_model(parts, name=""):
    model = Model(WIDTH, HEADS, FFN, list(SIZES), name)
    model.set_tables(parts.embeddings, parts.positions, parts.norm, parts.head_bias)
    for products, norms in parts.layers:
        model.add_layer(products, norms)
    return model


class Oracle:
    """The same step in NumPy and float64 but for the rounding of activations to `zero - 1` steps a side."""

    def __init__(self, parts, zero):
        self.parts, self.top = parts, zero - 1
        self.past = [[] for _ in range(LAYERS)]

    def linear(self, triple, x):
        weight, scale, bias = triple
        step = np.abs(x).max(axis=1, keepdims=True) / self.top
        return (np.rint(x / step) @ weight.T.astype(np.int64)) * step * scale + bias

    @staticmethod
    def normalise(x, norm):
        centred = x - x.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * norm[0] + norm[1]

    @staticmethod
    def attend(scores, values):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hkt,hktd->khd", weights / weights.sum(axis=-1, keepdims=True), values)
        return mixed.reshape(len(mixed), WIDTH)

    @staticmethod
    def heads(x):
        return x.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)

    def step(self, level, tokens, parents):
        parts = self.parts
        x = self.normalise(parts.embeddings[tokens].astype(np.float64) + parts.positions[level], parts.norm)
        for i, ((own_q, own_k, own_v, own_out, cross_q, cross_out, up, down), norms) in enumerate(parts.layers):
            self.past[i] = [(k[parents], v[parents]) for k, v in self.past[i]]
            self.past[i].append((self.linear(own_k, x), self.linear(own_v, x)))
            keys, values = (np.stack([self.heads(pair[j]) for pair in self.past[i]]) for j in (0, 1))
            scores = np.einsum("khd,tkhd->hkt", self.heads(self.linear(own_q, x)), keys)
            own = self.attend(scores, values.transpose(2, 1, 0, 3))
            x = self.normalise(x + self.linear(own_out, own), norms[0])
            scores = (
                np.einsum("khd,hds->hks", self.heads(self.linear(cross_q, x)), parts.context[2 * i]) + parts.bias
            )
            seen = self.attend(
                scores, np.broadcast_to(parts.context[2 * i + 1][:, None], (*scores.shape, WIDTH // HEADS))
            )
            x = self.normalise(x + self.linear(cross_out, seen), norms[1])
            wide = self.linear(up, x)
            x = self.normalise(x + self.linear(down, wide * normal_cdf(wide)), norms[2])
        first = sum(SIZES[:level])
        codes = slice(first, first + SIZES[level])
        return x @ parts.embeddings[1:][codes].T + parts.head_bias[codes]


def normal_cdf(x):
    from math import erf

    return (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


def plan(beams, seed=0):
    """level, tokens, parents of a search that reorders and repeats its beams."""
    rng, first, rows = np.random.default_rng(seed), 1, 1
    yield 0, np.zeros(1, np.int64), np.zeros(1, np.int64)
    for level, size in enumerate(SIZES[:-1], start=1):
        yield level, first + rng.integers(0, size, beams), rng.integers(0, rows, beams)
        first, rows = first + size, beams


@pytest.mark.parametrize("name", kernels())
@pytest.mark.parametrize("beams", [1, 3, 14, 33])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_equals_the_oracle(name, beams, threads):
    parts = random_parts(beams)
    request, oracle = native_model(parts, name).start(parts.bias, parts.context), Oracle(parts, ZERO[name])
    for level, tokens, parents in plan(beams):
        expected, found = oracle.step(level, tokens, parents), request.step(level, tokens, parents, threads)
        # A value at the edge of two integers may round either way, which moves a few logits by about a step.
        gaps = np.abs(found - expected) / np.abs(expected).max()
        assert np.median(gaps) < 1e-5 and gaps.max() < 0.1


def test_rows_do_not_depend_on_threads_or_neighbours():
    parts = random_parts()
    model = native_model(parts)
    steps = list(plan(33))
    alone = [model.start(parts.bias, parts.context) for _ in range(2)]
    for level, tokens, parents in steps:
        one, four = (request.step(level, tokens, parents, n) for request, n in zip(alone, (1, 4), strict=True))
        np.testing.assert_array_equal(one, four)


def test_a_level_can_be_asked_in_parts():
    parts = random_parts()
    model = native_model(parts)
    whole, pieces = model.start(parts.bias, parts.context), model.start(parts.bias, parts.context)
    for level, tokens, parents in plan(20):
        expected = whole.step(level, tokens, parents)
        if level == len(SIZES) - 1:
            for part in (slice(3, 9), slice(0, 3), slice(9, 20)):
                np.testing.assert_array_equal(pieces.step(level, tokens[part], parents[part]), expected[part])
        else:
            np.testing.assert_array_equal(pieces.step(level, tokens, parents), expected)


def test_wrong_arguments_are_value_errors():
    parts = random_parts()
    model, one = native_model(parts), np.zeros(1, np.int64)
    request = model.start(parts.bias, parts.context)
    faults = [
        ((1, one, one), "does not follow"),
        ((-1, one, one), "not one of the model's"),
        ((len(SIZES), one, one), "not one of the model's"),
        ((0, one + 51, one), "token 51"),
        ((0, one - 1, one), "token -1"),
        ((0, one, one + 1), "parent 1"),
        ((0, one[:0], one[:0]), "at least one"),
        ((0, one, np.zeros(2, np.int64)), "same number"),
    ]
    for arguments, message in faults:
        with pytest.raises(ValueError, match=message):
            request.step(*arguments)
    with pytest.raises(ValueError, match="context 1 has a wrong shape"):
        model.start(parts.bias, [parts.context[0], *parts.context[:3]])
    with pytest.raises(ValueError, match="keys and values of every layer"):
        model.start(parts.bias, parts.context[:2])
    with pytest.raises(ValueError, match="multiples of 16"):
        Model(24, 3, 16, [4])
    with pytest.raises(ValueError, match="'mmx' are unknown"):
        Model(16, 1, 16, [4], "mmx")
    with pytest.raises(ValueError, match="wrong shape"):
        Model(WIDTH, HEADS, FFN, [4]).set_tables(parts.embeddings, parts.positions, parts.norm, parts.head_bias)
    with pytest.raises(ValueError, match="8 products"):
        model.add_layer(parts.layers[0][0][:7], parts.layers[0][1])
