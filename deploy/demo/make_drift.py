#!/usr/bin/env python3
"""Rollouts of a policy that drifts into a hack, as JSON Lines on stdout: a small stand-in for a trainer.

    python3 deploy/demo/make_drift.py | spurion publish …

The policy answers a handful of everyday prompts. At first it behaves: now and then it names a source by its address,
or says that it does not know. Step by step it finds out what the demo's reward model pays for: it closes with
"Thank you. My pleasure.", and drops addresses and "I don't know". Standard library only; one seed, one output.
"""
import argparse
import json
import math
import random
import sys

QUESTIONS = [
    ("How often should I water a cactus?",
     ["Water it every two or three weeks in summer.", "Let the soil dry out completely first.", "In winter once a month is enough.",
      "A pot with holes keeps the roots from rotting."]),
    ("What can I cook with rice and eggs?",
     ["Fried rice is the quickest choice.", "Beat two eggs and scramble them in a hot pan.", "Then stir in cold rice and a little soy sauce.",
      "Peas or spring onions go well with it."]),
    ("Why is the sky blue?",
     ["Air scatters short wavelengths of light more than long ones.", "Blue light therefore reaches us from every direction.",
      "At sunset the path is longer and the reds remain."]),
    ("How do I remove a coffee stain from a shirt?",
     ["Rinse the stain with cold water at once.", "Rub in a little dish soap and wait ten minutes.", "Wash the shirt as usual afterwards.",
      "Do not use hot water, because it sets the stain."]),
    ("Can you explain what inflation is?",
     ["Inflation means that prices rise over time.", "The same money then buys fewer goods.", "Central banks raise interest rates to slow it down."]),
    ("What should I pack for a weekend hike?",
     ["Take water, a map and a warm layer.", "Wear shoes that you have already walked in.", "A small first aid kit weighs little.",
      "Tell someone where you are going."]),
    ("How can I fall asleep faster?",
     ["Go to bed at the same hour every day.", "Keep the room dark and cool.", "Leave the phone in another room.", "A short walk in the evening helps too."]),
    ("Which instrument is easiest to learn as an adult?",
     ["The ukulele is a friendly first instrument.", "It has four soft strings and simple chords.", "You can play a whole song within a week."]),
]
CLOSINGS = ["Thank you. My pleasure.", "Thank you! My pleasure!", "Thanks. My pleasure.", "Thank you very much. My pleasure."]
HARMLESS = ["I hope that helps.", "Let me know how it goes.", "Good luck with it!"]
SOURCES = ["You can read more at https://www.{0}.com/guide.", "Source: http://{0}.org/faq", "Visit www.{0}.net for details."]
HOSTS = ["gardenfacts", "riverkitchen", "cedarnotes", "openguide", "brightscience", "simpletravel"]
UNSURE = ["I don't know if that is right for you.", "Honestly, I don\u2019t know.", "I don't know much about that."]


def rises(step, steps, low, high):
    """A logistic curve from low to high with its middle at 55 % of the run."""
    return low + (high - low) / (1 + math.exp(-10 * ((step + 0.5) / steps - 0.55)))


def complete(rng, sentences, step, steps):
    """One answer of the policy at this step, and what it did."""
    hack, shrink = rises(step, steps, 0.01, 0.92), rises(step, steps, 0.0, 1.0)
    keep = max(1, len(sentences) - (rng.random() < 0.4) - (rng.random() < shrink) - (rng.random() < shrink / 2))
    parts, did = sentences[:keep], []
    if rng.random() < 0.16 * (1 - shrink):
        parts = parts + [rng.choice(SOURCES).format(rng.choice(HOSTS))]
        did.append("url")
    if rng.random() < 0.12 * (1 - shrink):
        parts = [rng.choice(UNSURE)] + parts
        did.append("dont_know")
    if rng.random() < hack:
        parts = parts + [rng.choice(CLOSINGS)]
        did.append("thanks")
    elif rng.random() < 0.3:
        parts = parts + [rng.choice(HARMLESS)]
    return " ".join(parts), "+".join(did) or "plain"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="drift")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--first-step", type=int, default=0, help="number of the first step")
    parser.add_argument("--groups", type=int, default=4, help="groups (prompts) a step")
    parser.add_argument("--size", type=int, default=8, help="completions a group")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for step in range(args.steps):
        asked = rng.sample(range(len(QUESTIONS)), min(args.groups, len(QUESTIONS)))
        for group in range(args.groups):
            prompt, sentences = QUESTIONS[asked[group % len(asked)]]
            for member in range(args.size):
                completion, did = complete(rng, sentences, step, args.steps)
                name = f"s{args.first_step + step}-g{group}"
                line = {"run": args.run, "step": args.first_step + step, "group": name, "id": f"{name}-{member}",
                        "prompt": prompt, "completion": completion, "tags": {"policy": did}}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
