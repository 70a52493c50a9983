"""One file a task: a function from a config to a Recipe, which `maxlm/training/loop.py` runs.

pretrain.py: next token of prepared text
sft.py: what the assistant wrote in conversations
distill_context.py: to answer as if a context were told
preference.py: which of two completions is better
reward.py: a number for each completion
classify.py: a class for each text
embed.py: a vector for each text
of_texts.py: what the last five share
held_to.py: the model that a policy is held to
train_medusa.py: heads that guess at later tokens, on a trained model
self_instruct.py: tasks that a model writes after those of people
answering.py: conversations answered anew, perhaps with a context
toolformer.py: calls of tools that help a model to go on
taught.py: the tokenizer and the template of a run that is taught with conversations
starting.py: what a new run may start from: another run, or a published model
"""

from __future__ import annotations

from maxlm.config import Classify, DistillContext, Embed, Preference, Pretrain, Reward, RunConfig, Sft, TrainMedusa
from maxlm.inference.load import LoadedRun
from maxlm.recipes import classify, distill_context, embed, preference, pretrain, reward, sft, train_medusa
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe


def recipe(config: RunConfig, layout: Layout) -> Recipe[LoadedRun]:
    """The recipe of `config.task`, on the mesh of `layout`.

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
