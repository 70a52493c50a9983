"""A mixture of experts: many gated MLPs, of which each token uses a few."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, assert_never

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, NotNegative, Positive, Range, config
from maxlm.config.mlp import Activation, Nonlinearity


@config("model.blocks[].mlp.router.groups.", changes=Changes.IDENTITY)
class ExpertGroups:
    """Consecutive experts are groups; a token chooses among those of its best groups, so that it travels to as few
    devices or nodes (DeepSeek-V2, arXiv:2405.04434, section 2.2.2; DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

    n_groups: Annotated[int, Range(ge=2)]
    """Groups, all of one size."""
    top_groups: Positive[int]
    """Groups that a token may choose experts of."""

    def __post_init__(self) -> None:
        if self.top_groups > self.n_groups:
            raise UserError(
                f"model.blocks[].mlp.router.groups.top_groups = {self.top_groups} is more than n_groups = "
                f"{self.n_groups}; use at most {self.n_groups}"
            )


@config("model.blocks[].mlp.router.", changes=Changes.IDENTITY)
class TopKRouter:
    """Each token goes to the experts of its largest scores, softmax(x router) (Shazeer 2017, arXiv:1701.06538)."""

    top_k: Positive[int]
    """Experts of a token; 1 needs normalize=False, which is Switch (arXiv:2101.03961)."""
    normalize: bool = True
    """The chosen gates sum to 1, which is a softmax after the choice (Mixtral, Qwen 3); False: they keep their share of
    the softmax over all experts, taken before the choice (Switch, DeepSeekMoE)."""
    load_balance: Annotated[NotNegative[float], Changes.TRAINING] = 0.01
    """Weight of E * sum_e f_e P_e, with f_e the share of choices and P_e the mean score of expert e; 1 when balanced
    (GShard, arXiv:2006.16668; Switch, section 2.2). Over the tokens of a
    micro-batch on all devices, so more `train.micro_batches` balance smaller sets."""
    groups: ExpertGroups | None = None
    """Choose among the experts of a few groups, those whose best expert scores most; None: among all."""
    bias: bool = False
    """The scores are x router + a learned vector (gpt-oss)."""


@config("model.blocks[].mlp.router.", changes=Changes.IDENTITY)
class NoisyTopKRouter:
    """Top-k of x router + N(0, 1) * softplus(x noise), gates by softmax after the choice (Shazeer 2017, eq. 3-5).

    The noise is there in training alone, and is the same on every mesh.
    """

    top_k: Annotated[int, Range(ge=2, note="the softmax of one score is 1, and its gradient 0")]
    """Experts of a token."""
    importance_loss: Annotated[NotNegative[float], Changes.TRAINING] = 0.1
    """Weight of CV(sum of gates of each expert)^2 (eq. 6 and 7)."""
    load_loss: Annotated[NotNegative[float], Changes.TRAINING] = 0.1
    """Weight of CV(smooth number of tokens of each expert)^2 (appendix A)."""


@config("model.blocks[].mlp.router.", changes=Changes.IDENTITY)
class SigmoidRouter:
    """Top-k of sigmoid(x router) + bias, where only the choice sees the bias; no auxiliary loss needed (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2; arXiv:2408.15664).

    After each step an expert's bias goes up by `bias_rate` if it had less than the mean load, down if more.
    """

    top_k: Positive[int]
    """Experts of a token; 1 needs normalize=False."""
    normalize: bool = True
    """The chosen scores are divided by their sum."""
    bias_rate: Annotated[NotNegative[float], Changes.TRAINING] = 1e-3
    """How far a bias moves in each step."""
    groups: ExpertGroups | None = None
    """Choose among the experts of a few groups, those whose two best score most, bias included; None: among all."""


@config("model.blocks[].mlp.router.", changes=Changes.IDENTITY)
class ExpertChoiceRouter:
    """Each expert takes the tokens of its largest scores, as many as `Capacity` gives it (Zhou et al. 2022,
    arXiv:2202.09368).

    Perfectly balanced, but a token's experts depend on later tokens of its group: such a model cannot decode.
    """


Router = TopKRouter | NoisyTopKRouter | SigmoidRouter | ExpertChoiceRouter


@config("model.blocks[].mlp.dispatch.", changes=Changes.IDENTITY)
class Dropless:
    """Every choice is computed: tokens are sorted by expert and multiplied group by group (MegaBlocks,
    arXiv:2211.15841)."""

    buffer: Annotated[float, Range(ge=1, note="None leaves room for the worst case")] | None = None
    """With `sharding.expert` > 1: room for received tokens on a device, as a multiple of the even share. What does not
    fit is dropped and counted. None: room for the worst case, which is sharding.expert times the even share."""

    def room(self, choices: int, *, top_k: int, n_experts: int, devices: int) -> float:
        """For what one device sends another, in rows, before it is rounded up: of so many choices, `top_k` a token."""
        # A token's choices differ, so no more of them can go to one device than it has experts.
        worst = choices // top_k * min(top_k, n_experts // devices)
        return worst if self.buffer is None else min(worst, self.buffer * choices / devices)


@config("model.blocks[].mlp.dispatch.", changes=Changes.IDENTITY)
class Capacity:
    """Each expert has room for a fixed number of each group's tokens; the rest is dropped, and passes through the
    residual alone (GShard, arXiv:2006.16668, algorithm 1). Decoding with a cache drops nothing."""

    factor: Positive[float] = 1.25
    """Room for ceil(factor * top_k * group_size / n_experts) tokens of a group (expert choice: top_k = 1)."""
    group_size: Positive[int] | None = None
    """Consecutive tokens of a sequence that share the room; None: the whole sequence. A group lies on one device, so it
    must divide the part of a sequence that a device has."""

    def group(self, seq_len: int) -> int:
        """Tokens of a group; a sequence shorter than `group_size` is one."""
        return min(self.group_size or seq_len, seq_len)

    def room(self, group: int, *, top_k: int, n_experts: int) -> int:
        """Tokens of a group that an expert takes."""
        return min(group, math.ceil(self.factor * top_k * group / n_experts))


Dispatch = Dropless | Capacity


@config("model.blocks[].mlp.", changes=Changes.IDENTITY)
class Experts:
    """A mixture of experts, all gated MLPs: shared(x) + routed_scaling * sum over chosen e of gate_e * expert_e(x)."""

    n_experts: Positive[int]
    """Experts that the router chooses among."""
    d_ff: Positive[int]
    """Width of one expert."""
    router: Router
    """How tokens and experts are matched."""
    dispatch: Dispatch = field(default_factory=Dropless)
    """How tokens get to their experts, and which of them are dropped."""
    n_shared_experts: NotNegative[int] = 0
    """Experts that every token uses, computed as one MLP of this many times d_ff (DeepSeekMoE, arXiv:2401.06066)."""
    routed_scaling: Positive[float] = 1.0
    """Factor of the chosen experts' sum, beside the shared ones."""
    router_z_loss: Annotated[NotNegative[float], Changes.TRAINING] = 0.0
    """Weight of the mean of logsumexp(x router)^2 (ST-MoE, arXiv:2202.08906, eq. 5)."""
    activation: Nonlinearity = Activation.SILU
    """Nonlinearity of the gate."""
    bias: bool = False
    """Every projection of every expert adds a learned vector."""
    clamp: Positive[float] | None = None
    """The routed experts' gates are at most this, before the nonlinearity, and what they multiply is between minus this
    and this (gpt-oss, arXiv:2508.10925); None: not so."""
    up_offset: NotNegative[float] = 0.0
    """Added to what the routed experts' gates multiply; gpt-oss: 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, and routers whose gates are 1 whatever they say: the loss never reaches them.

        Raises:
            UserError: one of these.
        """
        match self.router:
            case TopKRouter(top_k=1, normalize=True) | SigmoidRouter(top_k=1, normalize=True):
                raise UserError(
                    "model.blocks[].mlp.router.normalize = True with top_k = 1 makes every gate 1, so that the router "
                    "learns nothing from the loss; use normalize = False, or top_k = 2 or more"
                )
            case TopKRouter() | NoisyTopKRouter() | ExpertChoiceRouter() if self.n_experts == 1:
                raise UserError(
                    f"model.blocks[].mlp.n_experts = 1: the one score of a {type(self.router).__name__} is always 1, "
                    "so that it learns nothing from the loss; use 2 or more, or a GatedMlp"
                )
            case _:
                pass
        match self.router:
            case ExpertChoiceRouter():
                if not isinstance(self.dispatch, Capacity):
                    raise UserError("model.blocks[].mlp: ExpertChoiceRouter needs dispatch=Capacity(...)")
            case TopKRouter() | NoisyTopKRouter() | SigmoidRouter():
                if self.router.top_k > self.n_experts:
                    raise UserError(
                        f"model.blocks[].mlp.router.top_k = {self.router.top_k} is more than n_experts = "
                        f"{self.n_experts}; use at most {self.n_experts}"
                    )
        if isinstance(self.router, TopKRouter | SigmoidRouter) and self.router.groups is not None:
            self._groups_fit(self.router.groups, self.router.top_k)

    def _groups_fit(self, groups: ExpertGroups, top_k: int) -> None:
        """Raises UserError where experts cannot be cut into them, or those of a token are too few."""
        key = "model.blocks[].mlp.router.groups."
        each, rest = divmod(self.n_experts, groups.n_groups)
        if rest or each < 2:
            works = [n for n in range(2, self.n_experts // 2 + 1) if self.n_experts % n == 0]
            raise UserError(
                f"{key}n_groups = {groups.n_groups} does not cut n_experts = {self.n_experts} into groups of two or "
                f"more; use one of {works}, or groups = None"
            )
        if groups.top_groups * each < top_k:
            raise UserError(
                f"{key}top_groups = {groups.top_groups} groups of {each} experts have fewer than router.top_k = "
                f"{top_k}; use at least {-(-top_k // each)}"
            )

    @property
    def top_k(self) -> int:
        """Experts that a token chooses; 1 where experts choose, and `Capacity` alone tells how many."""
        return 1 if isinstance(self.router, ExpertChoiceRouter) else self.router.top_k

    @property
    def experts_per_token(self) -> float:
        """Of those that are not shared; where experts choose, the mean."""
        if isinstance(self.router, ExpertChoiceRouter):
            assert isinstance(self.dispatch, Capacity)
            return self.dispatch.factor
        return self.router.top_k

    def buffer_rows(self, tokens: int, *, seq_len: int, devices: int) -> int:
        """Rows of the buffer in which a device with so many tokens sends them to the `devices` that share the experts:
        as many as it then multiplies."""
        match self.dispatch:
            case Dropless() as dispatch:
                if devices == 1:
                    return tokens * self.top_k
                sent = dispatch.room(tokens * self.top_k, top_k=self.top_k, n_experts=self.n_experts, devices=devices)
                return devices * math.ceil(sent)
            case Capacity() as dispatch:
                group = dispatch.group(seq_len)
                room = dispatch.room(group, top_k=self.top_k, n_experts=self.n_experts)
                return self.n_experts * room * max(1, tokens // group)
            case _:
                assert_never(self.dispatch)
