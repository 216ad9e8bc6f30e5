"""Rollouts in ragged groups, with the awkward ones the contract speaks of."""

import random

from .words import EXTRAS, text


def make_rollouts(rng: random.Random, sizes: list[int], vocab: int, longest: int, bos: str | None,
                  with_awkward: bool = True) -> list[dict]:
    """Groups of the given sizes, completions of 1 to `longest` words; the last group speaks in ids."""
    rows = []
    for g, size in enumerate(sizes):
        prompt = text(rng, rng.randint(2, 25))
        for i in range(size):
            words = 1 if i == 0 else rng.randint(1, longest)
            row = {"run": "golden", "step": 3 + g, "group": f"g{g}", "id": f"g{g}-{i}"}
            if g == len(sizes) - 1:
                start = random.Random(g)
                row["prompt_ids"] = [start.randrange(3, vocab) for _ in range(1 + g)]
                row["completion_ids"] = [rng.randrange(3, vocab) for _ in range(words)]
            else:
                row |= {"prompt": prompt, "completion": text(rng, words)}
            if i % 3 == 1:
                row |= {"trainer_reward": rng.gauss(0, 2), "tags": {"env": "zoo"}}
            rows.append(row)
    return rows + (awkward(rng, bos) if with_awkward else [])


def awkward(rng: random.Random, bos: str | None) -> list[dict]:
    """Borders inside a token, prompts that differ within a group, a BOS in the text, a group that comes back."""
    rows = []

    def add(group, prompt, completion, **more):
        row = {"run": "golden", "step": 90, "group": group, "id": f"{group}-{len(rows)}", "prompt": prompt,
               "completion": completion}
        rows.append(row | more)

    stem = text(rng, 5)
    add("border", stem + " wat", "er is lo" + text(rng, 4))
    add("border", stem + " peo", "ple know")
    add("border", stem + "\n", "\n\nother words.")
    add("border", stem + " ", "little " + text(rng, 3))
    add("mixed", text(rng, 4), text(rng, 9))
    add("mixed", text(rng, 9), text(rng, 3))
    add("mixed", "", text(rng, 6))
    add("mixed", text(rng, 3), "a")
    for extra in EXTRAS:
        if extra.strip() and rng.random() < 0.4:
            add("extras", text(rng, 3), extra)
    if bos:
        add("once", bos + text(rng, 5), text(rng, 4))
        add("once", bos + text(rng, 5), bos + text(rng, 4))
        add("once", text(rng, 5), text(rng, 4) + bos)
    add("border", stem, " " + text(rng, 5))
    add("again", "attempts", " one word", attempt=0)
    rows.append(rows[-1] | {"attempt": 1})
    return rows


def as_messages(rng: random.Random, rows: list[dict]) -> None:
    """Some of the rollouts that speak in texts speak in messages instead, with and without a history."""
    for row in rows:
        if "prompt" not in row or rng.random() < 0.4:
            continue
        before = [{"role": "system", "content": text(rng, 3)}] if rng.random() < 0.3 else []
        if rng.random() < 0.4:
            before += [{"role": "user", "content": text(rng, 4)}, {"role": "assistant", "content": " " + text(rng, 3)}]
        row["messages"] = before + [{"role": "user", "content": row.pop("prompt")}, {"role": "assistant", "content": row.pop("completion")}]
