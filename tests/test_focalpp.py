"""FOCAL++: the contrast by hand, gates of mean 1, identity at the start, momentum, arms, learning, golden numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update

from omrl.algorithms.base import Spec, create
from omrl.algorithms.focalpp import Focalpp, matrix_contrast
from omrl.core.errors import UserError
from omrl.nets.attention import AttentionEncoder, Block
from omrl.nets.experience import Experience

SMALL = {
    "latent_dim": 3, "hidden": 16, "heads": 4, "blocks": 2, "reduction": 4, "encoder_width": 16, "encoder_depth": 2,
    "width": 16, "depth": 2, "meta_batch": 4, "rl_batch": 8, "context_batch": 6,
}  # fmt: skip
ARMS = {
    "full": {},
    "contrastive": {"attention": "none"},
    "batch": {"attention": "batch"},
    "sequence": {"attention": "sequence"},
    "row": {"tokens": "row"},
    "features": {"gate": "features-and-weights"},
    "metric": {"loss": "metric"},
}


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def focalpp(seed: int = 0, **values: Any) -> Focalpp:
    return create("focalpp", SMALL | values, Spec(2, 2, False), seed, "cpu")


def made_batch(seed: int = 1, scale: float = 1.0) -> dict[str, Experience]:
    g, tasks = source(seed), torch.tensor([0, 1, 1, 2])
    s, a, r = torch.randn(4, 12, 2, generator=g), torch.rand(4, 12, 2, generator=g), torch.randn(4, 12, generator=g)
    moves = moves_of(s[:, :8], a[:, :8], r[:, :8] * scale, s[:, :8] + 0.1, torch.zeros(4, 8))
    return meta_batch(tasks, bag_of(s, a, r), moves, lambda: moves)


def shaken(algorithm: Focalpp) -> Focalpp:
    """Move every weight, so that gates differ from 1 and branches from 0."""
    g = source(7)
    with torch.no_grad():
        for parameter in algorithm.encoder.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=g))
    return algorithm


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_contrast_by_hand():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    key = torch.tensor([[0.5, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    # logits / 0.5: rows [1, 0, 2], [0, 2, 2], [0.5, 1, 2]
    e = math.exp
    full = -(1 - math.log(e(1) + 1 + e(2))) - (2 - math.log(1 + 2 * e(2))) - (2 - math.log(e(0.5) + e(1) + e(2)))
    assert float(matrix_contrast(query, key, torch.tensor([0, 1, 2]), 0.5)) == pytest.approx(full, rel=1e-12)
    masked = -(1 - math.log(e(1) + 1)) - (2 - math.log(1 + 2 * e(2))) - (2 - math.log(e(1) + e(2)))
    assert float(matrix_contrast(query, key, torch.tensor([4, 1, 4]), 0.5)) == pytest.approx(masked, rel=1e-12)


def test_contrast_has_no_gradient_into_keys():
    query, key = (torch.randn(4, 3, generator=source(i), requires_grad=True) for i in (0, 1))
    matrix_contrast(query, key, torch.arange(4), 0.5).backward()
    assert key.grad is None
    assert float(query.grad.abs().sum()) > 0


def test_one_task_alone_has_nothing_to_contrast():
    z = torch.randn(4, 3, generator=source(0))
    assert float(matrix_contrast(z, z, torch.zeros(4, dtype=torch.long), 0.5)) == 0


@pytest.mark.parametrize("kind", ["both", "batch", "sequence"])
def test_a_block_is_the_identity_at_initialization(kind):
    x = torch.randn(2, 5, 3, 16, generator=source(0))
    out, weights = Block(16, 4, 4, kind, "weights", source(1))(x)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-6)
    assert (weights is None) == (kind == "sequence")


@pytest.mark.parametrize("kind", ["both", "batch"])
def test_the_gate_scales_features_only_where_it_shall(kind):
    x = torch.randn(2, 5, 3, 16, generator=source(0))
    plain, scaled = (Block(16, 4, 4, kind, gate, source(1)) for gate in ("weights", "features-and-weights"))
    with torch.no_grad():  # a gate that differs between transitions; the branches stay 0
        for block in (plain, scaled):
            block.gate.excite.weight.copy_(torch.randn(4, 16, generator=source(2)))
    (one, weights), (two, others) = plain(x), scaled(x)
    assert weights.std().item() > 0.01
    torch.testing.assert_close(weights, others)
    torch.testing.assert_close(one, x)
    torch.testing.assert_close(two, x * weights[..., None, None])


@pytest.mark.parametrize("arm", ["full", "batch", "row", "features"])
def test_weights_start_at_one_and_keep_mean_one(arm):
    context = made_batch()["context"]
    torch.testing.assert_close(focalpp(**ARMS[arm]).attention_weights(context), torch.ones(4, 12))
    weights = shaken(focalpp(**ARMS[arm])).attention_weights(context)
    torch.testing.assert_close(weights.mean(1), torch.ones(4))
    assert float(weights.std()) > 1e-3
    assert float(weights.min()) > 0


@pytest.mark.parametrize("arm", ARMS)
def test_order_of_the_context_does_not_matter(arm):
    algorithm, c = shaken(focalpp(**ARMS[arm])), made_batch()["context"]
    order = torch.randperm(12, generator=source(3))
    other = bag_of(c.observation[:, order], c.action[:, order], c.signal[:, order])
    torch.testing.assert_close(algorithm.infer(other), algorithm.infer(c))
    torch.testing.assert_close(algorithm.attention_weights(other), algorithm.attention_weights(c)[:, order])
    assert float(algorithm.infer(c).abs().max()) < 1 + 1e-6  # tanh saturates to 1 in float32


def test_entries_attend_to_each_other_and_a_row_cannot():
    for tokens, expected in (("entries", 5), ("row", 1)):
        seen: list[int] = []
        encoder = focalpp(tokens=tokens).encoder
        assert isinstance(encoder, AttentionEncoder)
        encoder.blocks[0].attention.register_forward_hook(lambda m, i, o, seen=seen: seen.append(i[0].shape[1]))
        encoder(made_batch()["context"].rows(False))
        assert seen == [expected]


def test_key_follows_the_stepped_encoder():
    algorithm = focalpp(momentum=0.75)
    before = copies(algorithm.key)
    update(algorithm, made_batch())
    for old, new, query in zip(before, copies(algorithm.key), copies(algorithm.encoder), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * query)
    assert any(not torch.equal(a, b) for a, b in zip(before, copies(algorithm.encoder), strict=True))


def test_dense_rewards_do_not_reach_the_encoder():
    one, two = focalpp(), focalpp()
    update(one, made_batch())
    update(two, made_batch(scale=-3.0))
    assert all(torch.equal(a, b) for a, b in zip(copies(one.encoder), copies(two.encoder), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(copies(one.actor_critic.q), copies(two.actor_critic.q), strict=True)
    )


def test_arms_have_no_parts_that_they_do_not_use():
    def names(arm: str) -> str:
        return " ".join(focalpp(**ARMS[arm]).model_state())

    assert "gate" in names("full")
    assert "attention" in names("full")
    assert "attention" not in names("batch")
    assert "gate" not in names("sequence")
    assert "blocks" not in names("contrastive")
    assert "key." in names("contrastive")
    assert "key." not in names("metric")
    assert [focalpp(loss=x).phases(1)[0].draws["context"].rows for x in ("contrastive", "metric")] == [12, 6]


@pytest.mark.parametrize(
    ("values", "key"),
    [({"heads": 3}, "heads"), ({"temperature": 0.0}, "temperature"), ({"momentum": 1.5}, "momentum"),
     ({"coupled": True}, "coupled"), ({"attention": "seq"}, "attention")],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(values, key):
    with pytest.raises(UserError, match=key):
        focalpp(**values)
    if key == "heads":  # without self-attention there are none
        for attention in ("batch", "none"):
            focalpp(**values, attention=attention)


# --- golden numbers ----------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. In double precision, so that they hold on every CPU.
GOLDEN: dict[str, dict[str, float]] = {
    "full": {
        "contrastive_loss": 4.9497133,
        "z_rms": 0.91157875,
        "q_loss": 12919.547,
        "q_mean": -0.0017002997,
        "v_loss": 2.0093916,
        "policy_loss": -1.3944841,
        "entropy": 1.3985197,
        "z_0": 0.99992602,
        "z_1": 0.4231219,
        "action_0": -0.0067722775,
        "action_1": -0.010893529,
        "gradient_encoder": 0.21548475,
        "gradient_actor_critic": 84.876635,
    },
    "features": {
        "contrastive_loss": 4.9480217,
        "z_rms": 0.90790823,
        "v_loss": 2.0084468,
        "q_loss": 12919.508,
        "q_mean": -0.0020544133,
        "policy_loss": -1.3941332,
        "entropy": 1.3985207,
        "z_0": 0.99905075,
        "z_1": 0.6487588,
        "action_0": -0.0067652857,
        "action_1": -0.01083043,
        "gradient_encoder": 0.60584695,
        "gradient_actor_critic": 84.701202,
    },
    "contrastive": {
        "contrastive_loss": 4.9698135,
        "z_rms": 0.0017920605,
        "v_loss": 2.0122499,
        "q_loss": 12919.667,
        "q_mean": -0.00081707327,
        "policy_loss": -1.39536,
        "entropy": 1.3987421,
        "z_0": -0.0039748183,
        "z_1": 0.0016285943,
        "action_0": -0.0065450244,
        "action_1": -0.01041704,
        "gradient_encoder": 0.00013489212,
        "gradient_actor_critic": 81.522942,
    },
    "batch": {
        "contrastive_loss": 5.2088617,
        "z_rms": 0.90911111,
        "q_loss": 12919.529,
        "q_mean": -0.0018064144,
        "v_loss": 2.009329,
        "policy_loss": -1.3945154,
        "entropy": 1.3985953,
        "z_0": 1.0,
        "z_1": 0.99999329,
        "action_0": -0.0070064951,
        "action_1": -0.010967194,
        "gradient_encoder": 1.5918803,
        "gradient_actor_critic": 84.972034,
    },
    "sequence": {
        "contrastive_loss": 5.0747286,
        "z_rms": 0.97296254,
        "v_loss": 2.0105234,
        "q_loss": 12919.592,
        "q_mean": -0.0019809516,
        "policy_loss": -1.3942868,
        "entropy": 1.3988018,
        "z_0": -0.98690784,
        "z_1": -1.0,
        "action_0": -0.0070764787,
        "action_1": -0.010494666,
        "gradient_encoder": 1.3305456,
        "gradient_actor_critic": 91.484887,
    },
    "row": {
        "contrastive_loss": 5.1217258,
        "z_rms": 0.88162193,
        "q_loss": 12919.531,
        "q_mean": -0.0017895972,
        "v_loss": 2.0069866,
        "policy_loss": -1.3943946,
        "entropy": 1.3987082,
        "z_0": 1.0,
        "z_1": 0.94076795,
        "action_0": -0.005972177,
        "action_1": -0.0096934963,
        "gradient_encoder": 1.6080037,
        "gradient_actor_critic": 79.865745,
    },
}


@pytest.mark.parametrize("arm", ["full", "features", "contrastive", "batch", "sequence", "row"])
def test_golden_numbers(arm, double_precision):
    algorithm = focalpp(**ARMS[arm])
    if arm != "contrastive":
        shaken(algorithm)
    for i in range(3):
        scalars = update(algorithm, made_batch(i))
    batch = made_batch(9)
    z = algorithm.infer(batch["context"])
    action = algorithm.actions(batch["transitions"].observation, z)[0, 0]
    got = {name: float(value) for name, value in scalars.items()}
    got |= {"z_0": float(z[0, 0]), "z_1": float(z[0, 1]), "action_0": float(action[0]), "action_1": float(action[1])}
    for name, module in algorithm.modules().items():
        gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        if gradients:
            got[f"gradient_{name}"] = float(torch.stack(gradients).norm())
    text = json.dumps({name: float(f"{value:.8g}") for name, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(arm, {}), rel=1e-6, abs=1e-12), f"if this change is meant: {text}"
