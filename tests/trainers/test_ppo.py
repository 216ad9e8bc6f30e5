"""TRL's real PPO trainer, which only versions up to 1.12 have (trl.experimental.ppo), with the daemon behind its reward model: real steps."""
import copy

import demo
import pytest

pytest.importorskip("trl.experimental.ppo", reason="needs a TRL that has PPO (tests/trainers/venvs.sh)")
import policy  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LlamaForSequenceClassification  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

from spurion import Client  # noqa: E402
from spurion.trl import reward_model  # noqa: E402

LENGTH, BATCH, STEPS = 24, 16, 2


def train(d, folder, **options):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, tok = policy.load()
    value = copy.deepcopy(model.config)
    value.num_labels = 1
    rows = [tok(q)["input_ids"] for q, _ in policy.QUESTIONS] * (BATCH * STEPS // len(policy.QUESTIONS))
    args = PPOConfig(output_dir=str(folder), per_device_train_batch_size=BATCH, total_episodes=BATCH * STEPS, num_ppo_epochs=1, num_mini_batches=1,
                     response_length=LENGTH, stop_token="eos", learning_rate=1e-4, num_sample_generations=0, save_strategy="no", report_to=[],
                     use_cpu=True, bf16=False, logging_steps=1, seed=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = PPOTrainer(args=args, processing_class=tok, model=model, ref_model=copy.deepcopy(model),
                         reward_model=reward_model(**d.addresses, response_length=LENGTH, **options),
                         value_model=LlamaForSequenceClassification(value), train_dataset=Dataset.from_dict({"input_ids": rows}))
    trainer.train()
    assert any(not torch.equal(before[k], v) for k, v in trainer.policy_model.state_dict().items())
    return [h for h in trainer.state.log_history if "objective/scores" in h], tok


@pytest.mark.parametrize("reward", ["clean", "counterfactual"])
def test_ppo_trains_on_the_reward_of_the_daemon(d, tmp_path, reward):
    run = f"ppo-{reward}"
    logs, tok = train(d, tmp_path, run=run, reward=reward)
    with Client(d.rpc) as c:
        rows = c.query(run)
        steps = sorted({r.step for r in rows})
        means = [sum(r.reward if reward == "clean" else r.counterfactual_reward for r in rows if r.step == s) / sum(r.step == s for r in rows) for s in steps]
        whole = [c.get(*r.key).rollout for r in rows if r.whole]
    assert len(rows) == BATCH * STEPS and len(logs) == STEPS
    assert [h["objective/scores"] for h in logs] == pytest.approx(means[:STEPS], abs=1e-4)
    questions = {tuple(tok(q)["input_ids"]) for q, _ in policy.QUESTIONS}
    assert whole and all(tuple(r.prompt_ids) in questions and 0 < len(r.completion_ids) <= LENGTH for r in whole)
