"""Losses, objectives, optimizers, the train step, and the loop that runs a recipe.

loop.py: a run of any recipe, top to bottom
objective.py: what is minimised; next-token prediction, and the call of the model
assistant_loss.py: what fine-tuning adds to the loss of the next token
in_products.py: the parameters as the loss multiplies by them: in 8 bits, or rounded
ahead.py: what a batch has some tokens further on
later_tokens.py: the loss of heads that guess at later tokens
step.py: gradient, optimizer: one step
keeper.py: the state of a run in its folder
spikes.py: spikes of the loss, and what is passed over to go back from one
rounding.py: parameters held in bfloat16, rounded by chance
stability.py: what a step remembers to keep steady: loss scale, spikes, the gradient's noise
watch.py: the size of all that a step computes, and what in it is not finite
finite.py: no state with NaN is saved, or gone on from
recovery.py: a phase that begins early, when the loss has recovered
config_file.py: config.json, and other settings for a run that goes on
rank_budget.py: what AdaLoRA does in a step beside the loss
router_metrics.py: load and drops of each mixture
warm_start.py: parameters of another run
chunk_scores.py: logits of a few tokens, over a device's part of the vocabulary
losses.py: cross-entropy and log-probabilities without the logits of a whole batch
text_objective.py: what objectives about whole texts share
preference_objective.py: DPO and its kin, KTO
context_objective.py: context distillation
policy_objective.py: PPO, GRPO and its kin
judging.py: reward models and classifiers
nearness.py: vectors of texts
text_sums.py: sums over each text of a batch
preference_losses.py: losses of preferences, rewards and embeddings, as functions of such sums
policy_losses.py: policy gradients: surrogates, KL estimates, advantages
optimizers.py: optax transformations from configs
muon.py: updates made orthogonal
eight_bit.py: moments of 8 bits
ema.py: the average of parameters over steps
schedules.py: learning rates
state.py: the train state and where its arrays live
"""

from maxlm.training.objective import Batch, NextToken, Objective, Sums
from maxlm.training.step import StepOutput, Trainer, make_trainer

__all__ = ["Batch", "NextToken", "Objective", "StepOutput", "Sums", "Trainer", "make_trainer"]
