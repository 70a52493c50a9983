"""Optimizers against their papers' formulas in float64 numpy, over several steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small_model, with_attention

from maxlm.config import Adafactor, AdamW, Dtype, GatedMlp, Lion, Muon, MuonScale, QkNorm, Sgd
from maxlm.models import declared, init_parameters
from maxlm.shapes import Array, Constant, Part, Role
from maxlm.training.optimizers import make_optimizer

DIMS = {
    "matrix": ("embed", "mlp"),
    "stacked": ("layers", "embed", "mlp"),
    "heads": ("layers", "embed", "heads", "head_dim"),
    "experts": ("layers", "experts", "embed", "mlp"),
    "table": ("vocab", "embed"),
    "norm": ("layers", "vector"),
    "bias": ("layers", "kv_heads", "head_dim"),
    "final_norm": ("vector",),
}
SHAPES = {
    "matrix": (7, 5),
    "stacked": (3, 4, 6),
    "heads": (3, 9, 2, 8),
    "experts": (3, 2, 4, 3),
    "table": (8, 5),
    "norm": (3, 7),
    "bias": (3, 2, 4),
    "final_norm": (7,),
}
LAYERS, STEPS = 3, 6


def rate(count):
    return 0.1 / (1 + count)


def parameters_and_gradients(seed=0):
    """Each layer of a stack with sizes of its own, so that nothing that mixes layers goes unseen."""
    rng = np.random.default_rng(seed)

    def draw(name, std):
        x = std * rng.normal(size=SHAPES[name])
        return x * np.array([0.01, 1, 30]).reshape(-1, *[1] * (x.ndim - 1)) if DIMS[name][0] == "layers" else x

    parameters = {name: draw(name, 1.0) for name in SHAPES}
    # Norms from well below to well above the clipping limit.
    gradients = [{name: draw(name, std) for name in SHAPES} for std in np.geomspace(1e-3, 10, STEPS)]
    return parameters, gradients


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def declared_as(dims):
    """Arrays with these dims, of which those that have an "embed" dim are matrices."""

    def array(path, names):
        role, name = Role.PRODUCT if "embed" in names else Role.OTHER, path[-1].key
        inputs = ("embed",) if role.decays else ()
        return Array(name, SHAPES.get(name, ()), names, Constant(0), role, Part.MLP, inputs=inputs)

    is_names = lambda leaf: isinstance(leaf, tuple)
    make = lambda path, leaf: array(path, leaf) if is_names(leaf) else leaf
    return jax.tree_util.tree_map_with_path(make, dims, is_leaf=is_names)


def run(config, parameters, gradients, dims=DIMS, layers=LAYERS):
    optimizer = make_optimizer(config, rate, declared_as(dims), layers=layers)

    @jax.jit
    def step(parameters, state, gradient):
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    parameters = narrow(parameters)
    state = optimizer.init(parameters)
    for gradient in gradients:
        parameters, state = step(parameters, state, narrow(gradient))
    return parameters


def clipped(gradient, limit):
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    return gradient if limit is None or norm < limit else {name: g * limit / norm for name, g in gradient.items()}


def decays(name):
    return "embed" in DIMS[name]


def adamw(config, parameters, gradients):
    """Algorithm 2 of arXiv:1711.05101, the decay times the learning rate."""
    x = dict(parameters)
    m, v = {n: np.zeros_like(p) for n, p in x.items()}, {n: np.zeros_like(p) for n, p in x.items()}
    for t, gradient in enumerate(gradients, 1):
        for name, g in clipped(gradient, config.clip_norm).items():
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            m_hat, v_hat = m[name] / (1 - config.b1**t), v[name] / (1 - config.b2**t)
            step = m_hat / (np.sqrt(v_hat) + config.eps)
            x[name] = x[name] - rate(t - 1) * (step + config.weight_decay * decays(name) * x[name])
    return x


def adafactor_one(config, x, gradients, factor, decay):
    """Algorithms 4 and 5 of arXiv:1804.04235 for one matrix or vector; gradients come clipped."""
    rms = lambda a: np.sqrt((a**2).mean())
    rows, columns, v = (np.zeros(x.shape[:-1]), np.zeros(x.shape[1:]), 0) if factor else (0, 0, np.zeros_like(x))
    mean = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-config.decay_rate
        if factor:
            rows = beta * rows + (1 - beta) * (g**2 + 1e-30).sum(1)
            columns = beta * columns + (1 - beta) * (g**2 + 1e-30).sum(0)
            v = np.outer(rows, columns) / rows.sum()
        else:
            v = beta * v + (1 - beta) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        if config.update_clip is not None:
            u = u / max(1, rms(u) / config.update_clip)
        size = max(1e-3, rms(x)) if config.scale_by_parameter else 1
        mean = config.b1 * mean + (1 - config.b1) * size * u
        x = x - rate(t - 1) * (mean + config.weight_decay * decay * x)
    return x


def adafactor(config, parameters, gradients):
    """Each layer's array by itself. Heads are the one case with more than a matrix: see below."""
    gradients = [clipped(gradient, config.clip_norm) for gradient in gradients]
    want = {}
    for name, x in parameters.items():
        layers = range(LAYERS) if DIMS[name][0] == "layers" else [...]
        want[name] = np.empty_like(x)
        for layer in layers:
            own, history = x[layer], [g[name][layer] for g in gradients]
            factor = own.ndim == 2 and sorted(own.shape)[-2] >= config.min_factored_dim
            want[name][layer] = adafactor_one(config, own, history, factor, decays(name))
    return want


def assert_close(got, want, rtol=2e-5):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=2e-6 * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.parametrize(
    "config", [AdamW(), AdamW(clip_norm=None), AdamW(b1=0.5, b2=0.7, eps=1e-3, weight_decay=0.0, clip_norm=0.2)]
)
def test_adamw_equals_the_paper(config):
    parameters, gradients = parameters_and_gradients()
    assert_close(run(config, parameters, gradients), adamw(config, parameters, gradients))


def test_adamw_keeps_its_first_moment_in_bfloat16_if_asked():
    """Half the bytes of one moment; steps within bfloat16's 8 bits of the paper's, and not those of float32."""
    config = AdamW(moment_dtype=Dtype.BFLOAT16)
    parameters, gradients = parameters_and_gradients()
    state = make_optimizer(config, rate, declared_as(DIMS), layers=LAYERS).init(narrow(parameters))
    kinds = [leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sorted(kinds) == ["bfloat16"] * len(SHAPES) + ["float32"] * len(SHAPES)
    got, exact = run(config, parameters, gradients), run(AdamW(), parameters, gradients)
    want = adamw(config, parameters, gradients)
    for name, start in parameters.items():
        moved = want[name] - start
        np.testing.assert_allclose(got[name] - start, moved, atol=0.02 * np.abs(moved).max(), err_msg=name)
        assert not np.array_equal(got[name], exact[name])


def lion(config, parameters, gradients):
    """Algorithm 2 of arXiv:2302.06675."""
    x, m = dict(parameters), {n: np.zeros_like(p) for n, p in parameters.items()}
    for t, gradient in enumerate(gradients, 1):
        for name, g in clipped(gradient, config.clip_norm).items():
            sign = np.sign(config.b1 * m[name] + (1 - config.b1) * g)
            x[name] = x[name] - rate(t - 1) * (sign + config.weight_decay * decays(name) * x[name])
            m[name] = config.b2 * m[name] + (1 - config.b2) * g
    return x


@pytest.mark.parametrize("config", [Lion(), Lion(b1=0.5, b2=0.7, weight_decay=0.0, clip_norm=None)])
def test_lion_equals_the_paper(config):
    parameters, gradients = parameters_and_gradients()
    assert_close(run(config, parameters, gradients), lion(config, parameters, gradients))


def sgd(config, parameters, gradients):
    """Sutskever et al. 2013 as PyTorch has it, with the decay of arXiv:1711.05101, algorithm 1."""
    x, sums = dict(parameters), {n: np.zeros_like(p) for n, p in parameters.items()}
    for t, gradient in enumerate(gradients, 1):
        for name, g in clipped(gradient, config.clip_norm).items():
            sums[name] = config.momentum * sums[name] + g
            step = g + config.momentum * sums[name] if config.nesterov else sums[name]
            x[name] = x[name] - rate(t - 1) * (step + config.weight_decay * decays(name) * x[name])
    return x


@pytest.mark.parametrize("config", [Sgd(), Sgd(nesterov=True, weight_decay=0.2, clip_norm=None), Sgd(momentum=0.0)])
def test_sgd_equals_its_formula(config):
    parameters, gradients = parameters_and_gradients()
    assert_close(run(config, parameters, gradients), sgd(config, parameters, gradients))


def newton_schulz(x, steps):
    """Of the post of Jordan et al. 2024, in float64."""
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


INPUTS = {"matrix": 7, "stacked": 4, "heads": 9, "experts": 4}
MATRICES_IN = {"matrix": 1, "stacked": LAYERS, "heads": LAYERS, "experts": 2 * LAYERS}


def muon(config, parameters, gradients):
    """Each matrix of each layer and expert by itself, heads side by side; AdamW for the rest."""
    gradients = [clipped(gradient, config.clip_norm) for gradient in gradients]
    adam = AdamW(clip_norm=None, weight_decay=0, b1=config.b1, b2=config.b2, eps=config.eps)
    ratio = config.adam_learning_rate / config.learning_rate
    want = {}
    for name, x in parameters.items():
        history = [{name: g[name]} for g in gradients]
        if name not in INPUTS:
            x = {name: x.copy()}
            for t in range(1, len(history) + 1):  # a step of AdamW is the difference of two of its ends from 0
                before, after = (adamw(adam, {name: 0 * x[name]}, history[:n])[name] for n in (t - 1, t))
                decay = config.weight_decay * decays(name) * x[name]
                x[name] = x[name] + ratio * (after - before - rate(t - 1) * decay)
            want[name] = x[name]
            continue
        flat = lambda a, name=name: a.reshape(MATRICES_IN[name], INPUTS[name], -1)
        matrices, momenta = flat(x).copy(), np.zeros_like(flat(x))
        outputs = matrices.shape[-1]
        scale = {
            MuonScale.JORDAN: max(1, outputs / INPUTS[name]) ** 0.5,
            MuonScale.MOONLIGHT: 0.2 * max(outputs, INPUTS[name]) ** 0.5,
        }[config.scale]
        for t, gradient in enumerate(history, 1):
            momenta = config.momentum * momenta + flat(gradient[name])
            ahead = flat(gradient[name]) + config.momentum * momenta if config.nesterov else momenta
            made = np.stack([newton_schulz(one, config.newton_schulz_steps) for one in ahead])
            matrices = matrices - rate(t - 1) * (scale * made + config.weight_decay * matrices)
        want[name] = matrices.reshape(x.shape)
    return want


@pytest.mark.parametrize(
    "config",
    [
        Muon(newton_schulz_dtype=Dtype.FLOAT32, learning_rate=0.02, adam_learning_rate=0.01),
        Muon(
            newton_schulz_dtype=Dtype.FLOAT32, scale=MuonScale.JORDAN, nesterov=False, clip_norm=None, weight_decay=0.0
        ),
    ],
)
def test_muon_equals_its_formula(config):
    """Also says that heads are one matrix, that layers and experts are not, and that nothing else is one."""
    parameters, gradients = parameters_and_gradients()
    assert_close(run(config, parameters, gradients), muon(config, parameters, gradients), 2e-3)


ADAFACTORS = {
    "paper": Adafactor(min_factored_dim=4, clip_norm=None),
    "clipped_and_decayed": Adafactor(min_factored_dim=4, clip_norm=1.0, weight_decay=0.3),
    "nothing_factored": Adafactor(min_factored_dim=100, clip_norm=None, update_clip=0.3),
    "with_a_first_moment": Adafactor(min_factored_dim=4, b1=0.9, weight_decay=0.3),
    "bare": Adafactor(min_factored_dim=4, clip_norm=None, update_clip=None, scale_by_parameter=False, decay_rate=0.5),
}


@pytest.mark.parametrize("name", ADAFACTORS)
def test_adafactor_equals_the_paper(name):
    """Also says that every layer of a stack goes its own way, as if it were not stacked."""
    config = ADAFACTORS[name]
    parameters, gradients = parameters_and_gradients()
    got, want = run(config, parameters, gradients), adafactor(config, parameters, gradients)
    if config.min_factored_dim < 9:
        del want["heads"]
    assert_close(got, want, 5e-5)


def test_adafactor_factors_the_two_largest_dims_of_heads():
    """[D, H] of each head, here the second and the fourth of four dims."""
    config = Adafactor(min_factored_dim=4, clip_norm=None, update_clip=None, scale_by_parameter=False)
    parameters, gradients = parameters_and_gradients()
    got = run(config, parameters, gradients)["heads"]
    for layer, head in np.ndindex(LAYERS, 2):
        history = [g["heads"][layer, :, head] for g in gradients]
        want = adafactor_one(config, parameters["heads"][layer, :, head], history, True, True)
        np.testing.assert_allclose(got[layer, :, head], want, rtol=5e-5, atol=2e-5)


def test_adafactor_never_factors_over_layers():
    """As many layers as other dims are long: the moments must keep each layer apart."""
    rng = np.random.default_rng(0)
    dims, x = {"norm": ("layers", "vector")}, {"norm": rng.normal(size=(9, 7))}
    gradients = [{"norm": rng.normal(size=(9, 7)) * np.geomspace(1e-3, 1e3, 9)[:, None]} for _ in range(3)]
    config = Adafactor(min_factored_dim=4, clip_norm=None)
    got = run(config, x, gradients, dims, layers=9)["norm"]
    for layer in range(9):
        want = adafactor_one(config, x["norm"][layer], [g["norm"][layer] for g in gradients], False, False)
        np.testing.assert_allclose(got[layer], want, rtol=5e-5, atol=1e-6)


def test_adafactor_keeps_small_state():
    parameters = {"matrix": jnp.zeros((200, 300)), "stacked": jnp.zeros((3, 200, 300)), "thin": jnp.zeros((200, 100))}
    dims = {"matrix": ("embed", "mlp"), "stacked": ("layers", "embed", "mlp"), "thin": ("embed", "mlp")}
    state = make_optimizer(Adafactor(), rate, declared_as(dims), layers=3).init(parameters)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1)
    assert sizes == [200, 300, 3 * 200, 3 * 300, 200 * 100]


@pytest.fixture(scope="module")
def full_model():
    """A decoder with every kind of parameter: two blocks, biases, head norms, an output table of its own."""
    model = with_attention(small_model(n_layers=4), qkv_bias=True, out_bias=True, qk_norm=QkNorm.HEADS)
    block = dataclasses.replace(model.blocks[0], mlp=GatedMlp(d_ff=48, bias=True))
    model = dataclasses.replace(model, blocks=(block, block))
    return declared(model), jax.jit(lambda: init_parameters(model, jax.random.key(0)))()


MATRICES = {"embed", "unembed", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_decay_is_for_the_matrices(full_model):
    marked, unmarked = set(), set()
    for path, decayed in jax.tree_util.tree_leaves_with_path(full_model[0]):
        (marked if decayed.role.decays else unmarked).add(path[-1].key)
    assert marked == MATRICES
    assert unmarked == {"scale"} | {f"{name}_bias" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize("cls", [AdamW, Adafactor, Lion, Muon, Sgd])
def test_decay_shrinks_matrices_and_nothing_else(full_model, cls):
    """With gradients of zero, decay is all that is left."""
    arrays, parameters = full_model
    config = cls(weight_decay=0.5)
    parameters = jax.tree.map(lambda p: p + 0.25, parameters)  # biases start at 0, where decay would not show
    after = run(config, parameters, [jax.tree.map(jnp.zeros_like, parameters)], arrays, layers=2)
    kept = 1 - rate(0) * 0.5
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(parameters), strict=True):
        factor = kept if path[-1].key in MATRICES else 1.0
        np.testing.assert_allclose(new, factor * old, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("config", [AdamW(clip_norm=0.5), Adafactor(clip_norm=0.5)])
def test_a_clipped_gradient_keeps_its_direction(config):
    """Ten times the gradient is the same gradient, once both are clipped; sparse rows stay finite."""
    parameters, gradients = parameters_and_gradients()
    gradients[-1]["matrix"][2] = 0
    assert_close(
        run(config, parameters, gradients[-1:]),
        run(config, parameters, [{name: 10 * g for name, g in gradients[-1].items()}]),
    )
