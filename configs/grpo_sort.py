import dataclasses
from configs.sort_sft import get_config as sft, sorts
from maxlm.config import *
def get_config():
    base = sft()
    return dataclasses.replace(base, data=sorts(Purpose.PROMPTS),
        train=dataclasses.replace(base.train, steps=100, batch_size=256, seq_len=40, eval_every=25, log_every=10),
        optimizer=AdamW(learning_rate=3e-4, schedule=ConstantSchedule(warmup_steps=0)) ,
        checkpoint=CheckpointConfig(every=25, init_from="runs/sort_sft"),
        task=Grpo(rewards=(ExactReward(),), rollouts=Rollouts(prompts=32, samples=8, max_new_tokens=8)),
        run_dir="runs/grpo_sort")
