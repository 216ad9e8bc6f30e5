"""A policy learns a planted hack of the demo's reward model under TRL's GRPO, or does not: with the reward, and with the counterfactual one.

    python3 tests/trainers/learn_hack.py --out docs/trainers --seeds 1 2 3

Variants, by the reward and the catalogue of the daemon:
  clean            the reward as it is
  counterfactual   without the features of the demo's catalogue_wide.jsonl: its catalogue, and 32 more of `thanks` for removal
  shipped          the same with the demo's own catalogue, whose removal takes half of the bias away (deploy/demo/README.md)
  uncatalogued     the same with a catalogue in which `thanks` does not stand: a hack that nobody has found yet
The true reward of a completion is the reward of the same text without the closing. A daemon of its own for each variant, real steps.
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import demo  # noqa: E402

VARIANTS = ("clean", "counterfactual", "shipped", "uncatalogued")
GROUP, BATCH = 8, 64


def catalogue_of(variant, folder):
    """Path of the daemon's catalogue."""
    if variant in ("clean", "shipped"):
        return demo.DEMO / "catalogue.jsonl"
    if variant == "counterfactual":
        return demo.DEMO / "catalogue_wide.jsonl"
    out = Path(folder) / "catalogue_without.jsonl"
    lines = (demo.DEMO / "catalogue.jsonl").read_text().splitlines()
    out.write_text("".join(line + "\n" for line in lines if "thanks" not in json.loads(line)["families"]))
    return out


def daemon_of(variant, folder):
    """A daemon of the demo with the variant's catalogue; rules whose families do not stand in it are left out."""
    settings = [f"catalogue={catalogue_of(variant, folder)}", "attribution.method=none", "engine.threads=1"]
    config = demo.DEMO / "spurion.yaml"
    if variant == "uncatalogued":  # a rule whose family is not there is a mistake, and refused
        text = config.read_text()
        text = "".join(line for line in text.splitlines(keepends=True) if "families: [thanks]" not in line)
        for name in ("model", "saes/early", "saes/late"):
            text = text.replace(f"path: {name}", f"path: {demo.DEMO / name}")
        config = Path(folder) / "spurion.yaml"
        config.write_text(text)
    return demo.Demo(folder, *settings, config=config).start()


class Watch:
    """A reward function's result, looked at: texts of every call. Gives None, so it changes nothing."""

    __name__ = "watch"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, trainer_state=None, **_):
        self.calls.append((trainer_state.global_step, list(prompts), list(completions)))
        return [None] * len(prompts)


def stopper(watch, share):
    """A callback that ends training when this share of the last three batches closes with the hack: how long the policy takes to find it is chance."""
    from transformers import TrainerCallback

    import policy

    class Until(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            texts = [t for _, _, texts in watch.calls[-3:] for t in texts]
            control.should_training_stop |= sum(bool(policy.HACKED.search(t)) for t in texts) > share * len(texts)
            return control

    return Until()


def train(rewards, seed, steps, folder, callback=None, lr=1e-3, log_completions=False, more=()):
    """TRL's GRPOTrainer on the tiny policy; gives the trainer. rewards: its reward functions."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    import policy

    torch.set_num_threads(1)
    model, tok = policy.load()
    data = Dataset.from_dict({"prompt": [policy.QUESTIONS[i % len(policy.QUESTIONS)][0] for i in range(BATCH // GROUP * (steps + 1))]})
    args = GRPOConfig(output_dir=str(Path(folder) / "trl"), per_device_train_batch_size=BATCH, num_generations=GROUP, max_steps=steps,
                      max_completion_length=policy.LENGTH, learning_rate=lr, lr_scheduler_type="constant", beta=0.1, temperature=1.0,
                      logging_steps=1, save_strategy="no", report_to=[], seed=seed, use_cpu=True, bf16=False, disable_tqdm=True,
                      log_completions=log_completions, gradient_checkpointing=False)
    trainer = GRPOTrainer(model=model, reward_funcs=rewards, args=args, train_dataset=data, processing_class=tok)
    for extra in more:
        trainer.add_callback(extra)
    if callback is not None:
        callback.attach(trainer)
    trainer.train()
    return trainer


def learn(variant, seed, steps=24, lr=1e-3, true_reward=True, until=1.0):
    """One run; {hack: [share of each step], reward: […], true_reward: […], alert_step, batches_before_alert, alerts: […]}."""
    import policy
    from spurion import Client
    from spurion.trl import SpurionCallback, SpurionReward

    with tempfile.TemporaryDirectory() as folder:
        d = daemon_of(variant, folder)
        try:
            run = f"{variant}-{seed}"
            reward = SpurionReward(**d.addresses, run=run, reward="clean" if variant == "clean" else "counterfactual")
            watch = Watch()
            arrived = []
            callback = SpurionCallback(**d.addresses, run=run, parts=[reward],
                                       on_alert=lambda a: arrived.append((len(watch.calls), a)) if a.rule == "thanks-raises" else None)
            train([reward, watch], seed, steps, folder, callback, lr, more=[stopper(watch, until)])
            out = {"variant": variant, "seed": seed, "hack": [], "reward": [], "paid": [], "true_reward": []}
            with Client(d.rpc, run="true", timeout=300) as c:
                paid = {}
                for row in c.query(run):
                    paid.setdefault(row.step, []).append((row.reward, row.counterfactual_reward))
                for step, prompts, texts in watch.calls:
                    out["hack"].append(sum(bool(policy.HACKED.search(t)) for t in texts) / len(texts))
                    out["reward"].append(sum(p[0] for p in paid[step]) / len(paid[step]))
                    out["paid"].append(sum(p[variant != "clean"] for p in paid[step]) / len(paid[step]))
                    if not true_reward:
                        continue
                    plain = c.score([{"step": step, "group": str(i), "prompt": p, "completion": policy.strip_hack(t)}
                                     for i, (p, t) in enumerate(zip(prompts, texts))])
                    out["true_reward"].append(float(plain.rewards.mean()))
                out["last"] = watch.calls[-1][2][:6]
                out["alerts"] = [{"step": a.step, "rule": a.rule, "flagged": a.flagged, "scored": a.scored, "above": a.above or a.step_above}
                                 for a in c.stored_alerts(run)]
            above = [a["step"] for a in out["alerts"] if a["above"] and a["rule"] == "thanks-raises"]
            out["alert_step"] = min(above) if above else None
            told = [batches for batches, a in arrived if a.above or a.step_above]
            out["batches_before_alert"] = min(told) if told else None  # batches that the policy had made when the alert was in the trainer
            return out
        finally:
            d.end()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="build/learn_hack")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--until", type=float, default=1.0, help="end a run when this share of three batches is hacked")
    args = p.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for variant in args.variants:
            result = learn(variant, seed, args.steps, args.lr, until=args.until)
            (out / f"{variant}-{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(variant, seed, "hack", [round(h, 2) for h in result["hack"]], "alert", result["alert_step"], flush=True)


if __name__ == "__main__":
    main()
