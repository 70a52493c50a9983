"""One file a task: a function from a config to a Recipe, which `maxlm/training/loop.py` runs.

pretrain.py: next token of prepared text
sft.py: what the assistant wrote in conversations
distill_context.py: to answer as if a context were told
preference.py: which of two completions is better
reward.py: a number for each completion
rewards.py: what is good in completions, from several sources
completions.py: what a policy wrote, and what is said of it
model_reward.py: rewards of a reward model
judge.py: rewards of a model that answers yes or no
classify.py: a class for each text
embed.py: a vector for each text
of_texts.py: what reward, preference, distill_context, classify and embed share
held_to.py: the model that a policy is held to
grpo.py: what is worth more than other answers to the same prompt
ppo.py: the same with a critic
reinforced.py: what both share
rollouts.py: answers of the policy, as batches
writing.py: the engine that writes them
tools.py: what it may call while it writes
train_medusa.py: heads that guess at later tokens, on a trained model
self_instruct.py: tasks that a model writes after those of people
mixture_runs.py: small runs on other weights of the same data sets
mixture_search.py: the weights that a law of such runs likes best
compared.py: runs that answer the same prompts, judged
answering.py: conversations answered anew, perhaps with a context
toolformer.py: calls of tools that help a model to go on
responding.py: models that answer prompts, for the builders below
rejection.py: of several answers the best, or the best and the worst
star.py: chains of thought that reach the right answer
attacks.py: questions of one model to which another answers badly
class_judge.py: what answers are worth by a classifier
taught.py: the tokenizer and the template of a run that is taught with conversations
starting.py: what a new run may start from: another run, or a published model
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from maxlm.config import (
    Classify,
    DistillContext,
    Embed,
    Grpo,
    Ppo,
    Preference,
    Pretrain,
    Reward,
    RunConfig,
    Sft,
    TrainMedusa,
)
from maxlm.inference.load import LoadedRun
from maxlm.recipes import classify, distill_context, embed, grpo, ppo, preference, pretrain, reward, sft, train_medusa
from maxlm.recipes.rewards import RewardFunction
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe


def recipe(
    config: RunConfig, layout: Layout, functions: Mapping[str, RewardFunction] = MappingProxyType({})
) -> Recipe[LoadedRun]:
    """The recipe of `config.task`, on the mesh of `layout`.

    Args:
        config: all of the run.
        layout: where it runs.
        functions: those of the config file, by name, for a `FunctionReward`.

    Raises:
        UserError: the data or another run that it needs is not there or does not fit.
    """
    match config.task:
        case Pretrain():
            return pretrain.recipe(config, config.task, layout)
        case Sft():
            return sft.recipe(config, config.task, layout)
        case DistillContext():
            return distill_context.recipe(config, config.task, layout)
        case Preference():
            return preference.recipe(config, config.task, layout)
        case Reward():
            return reward.recipe(config, config.task, layout)
        case Classify():
            return classify.recipe(config, config.task, layout)
        case Embed():
            return embed.recipe(config, config.task, layout)
        case TrainMedusa():
            return train_medusa.recipe(config, config.task, layout)
        case Grpo():
            return grpo.recipe(config, config.task, layout, functions)
        case Ppo():
            return ppo.recipe(config, config.task, layout, functions)
