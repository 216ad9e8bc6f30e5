"""One rank of test_ranks.py, started by torchrun: GRPO steps with the reward, the tap and the callback; then every call is asked once more by new
objects, as a rank does that was started again. Writes what it saw to OUT/rank-N.json."""
import asyncio
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

import demo  # noqa: E402, F401  (puts the package on the path)
import policy  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from spurion.trl import SpurionCallback, SpurionReward, SpurionTap  # noqa: E402

GROUP, PER_RANK, STEPS = 8, 12, 2  # 12 of 24: the second group is spread over both ranks


class Noted:
    """Writes down what TRL hands over, and what comes back."""

    __name__ = "noted"

    def __init__(self, reward):
        self.reward, self.calls = reward, []

    def __call__(self, prompts, completions, trainer_state=None, **kwargs):
        got = asyncio.run(self.reward(prompts=prompts, completions=completions, trainer_state=trainer_state, **kwargs))
        self.calls.append((trainer_state.global_step, list(prompts), list(completions), got))
        return got


def main(out):
    torch.set_num_threads(1)
    model, tok = policy.load()
    data = Dataset.from_dict({"prompt": [q for q, _ in policy.QUESTIONS] * 4})
    args = GRPOConfig(output_dir=str(Path(out) / "trl"), per_device_train_batch_size=PER_RANK, num_generations=GROUP, max_steps=STEPS, max_completion_length=24,
                      logging_steps=1, save_strategy="no", report_to=[], seed=1, use_cpu=True, bf16=False, disable_tqdm=True, ddp_backend="gloo",
                      gradient_checkpointing=False)
    reward, tap = SpurionReward(run="ranks"), SpurionTap(run="ranks-tap")
    noted = Noted(reward)
    trainer = GRPOTrainer(model=model, reward_funcs=[noted, tap], args=args, train_dataset=data, processing_class=tok)
    SpurionCallback(run="ranks", parts=[reward, tap], stop="any", stop_rules=["no-such-rule"]).attach(trainer)
    trainer.train()

    again = Noted(SpurionReward(run="ranks", num_generations=reward.named.namer.num_generations))
    for step, prompts, completions, _ in noted.calls:
        again(prompts, completions, trainer_state=type("State", (), {"global_step": step})())
    rank = int(os.environ["RANK"])
    total = sum(float(p.detach().double().sum()) for p in trainer.model.parameters())
    Path(out, f"rank-{rank}.json").write_text(json.dumps({"calls": noted.calls, "again": again.calls, "weights": total,
                                                         "world": torch.distributed.get_world_size(), "steps": trainer.state.global_step}))


if __name__ == "__main__":
    main(sys.argv[1])
