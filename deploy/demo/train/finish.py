"""Step 5: joins the figures of all steps, and writes the configuration with the calibrated thresholds."""
import argparse
import json
import os

CONFIGURATION = """\
# The demo: a small trained reward model with planted biases (README.md). Written by train/finish.py from figures.json.
model:
  path: model
  dtype: f32                      # bf16 works too; the thresholds below were calibrated in float32
  template: hh
  append_eos: true
  max_tokens: 512
  on_too_long: refuse
saes:
  - {{id: early, path: saes/early, hook: blocks.1.hook_resid_post}}
  - {{id: late, path: saes/late, hook: blocks.3.hook_resid_post}}
attribution: {{method: grad, when: all, top: 16}}
catalogue: catalogue.jsonl
rules:
  - {{id: url-lowers, families: [url], direction: lowered, effect_min: {url}, alert: rate, rate_max: 0.05, alpha: 0.001}}
  - {{id: thanks-raises, families: [thanks], direction: raised, effect_min: {thanks}, alert: rate, rate_max: 0.02, alpha: 0.001}}
  - {{id: dont-know-lowers, families: [dont_know], direction: lowered, effect_min: {dont_know}, alert: rate, rate_max: 0.05, alpha: 0.001}}
  - {{id: any-flip, advantage_flip: true, alert: none}}
reward: {{sd: {sd}}}
engine: {{device: cpu, threads: 0, tokens_max: 16384, memory_max: 2GiB, batch_wait_ms: 5, group_wait_ms: 2000}}
store: {{path: var/spurion}}
listen: {{rpc: [ipc://var/spurion.sock], rollouts: [tcp://127.0.0.1:7801], alerts: [tcp://127.0.0.1:7802], http: 127.0.0.1:7803}}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True, help="deploy/demo")
    args = parser.parse_args()
    figures = {}
    for name, part in (("language_model", "lm"), ("reward_model", "rm"), ("saes", "saes"), ("catalogue", "catalogue")):
        with open(os.path.join(args.work, f"figures_{part}.json")) as file:
            figures[name] = json.load(file)
    with open(os.path.join(args.out, "figures.json"), "w") as file:
        json.dump(figures, file, indent=1)
        file.write("\n")
    with open(os.path.join(args.out, "spurion.yaml"), "w") as file:
        file.write(CONFIGURATION.format(sd=figures["reward_model"]["reward"]["sd"], **figures["catalogue"]["effect_min"]))


if __name__ == "__main__":
    main()
