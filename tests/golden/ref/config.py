"""Configuration and catalogue, as far as the verdict depends on them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

KNOWN = {
    "model": {"path", "dtype", "head_index", "head_weights", "pooling", "template", "append_eos", "max_tokens", "on_too_long"},
    "attribution": {"method", "when", "ig_steps", "ig_rule", "scope", "top", "completeness"},
    "ablation": {"each"},
    "reward": {"sd", "trainer_tolerance"},
    "engine": {"device", "threads", "tokens_max", "memory_max", "batch_wait_ms", "group_wait_ms"},
    "store": None,
    "listen": None,
    "saes": None,
    "rules": None,
    "catalogue": None,
}
KNOWN_SAE = {"id", "path", "hook", "format", "norm_factor"}
KNOWN_RULE = {"id", "families", "direction", "effect_min", "effect_sd_min", "advantage_flip", "alert", "rate_max", "alpha"}


class ConfigError(ValueError):
    """The configuration cannot be used; the whole run is refused."""


@dataclass
class Feature:
    """One catalogue line."""

    sae: str
    index: int
    label: str | None
    families: list[str]
    verdict: str
    role: str
    activation_min: float


@dataclass
class Config:
    """Everything the judge needs, with the defaults of the contract filled in."""

    folder: Path
    model: dict
    saes: list[dict]
    attribution: dict
    each: bool
    rules: list[dict]
    reward_sd: float | None
    trainer_tolerance: float
    catalogue: dict[tuple[str, int], Feature] = field(default_factory=dict)


def _refuse_unknown(where: str, found: dict, known: set) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(f"{where}: expected one of {sorted(known)}, found {key!r}")


def _read_rules(rules: list[dict], reward_sd: float | None) -> list[dict]:
    out = []
    for rule in rules:
        _refuse_unknown("rules", rule, KNOWN_RULE)
        conditions = ("effect_min", "effect_sd_min", "advantage_flip")
        if not any(rule.get(c) not in (None, False) for c in conditions):
            raise ConfigError(f"rule {rule.get('id')}: expected one of {conditions}, found none")
        if rule.get("effect_sd_min") is not None and reward_sd is None:
            raise ConfigError(f"rule {rule['id']}: effect_sd_min expected reward.sd, found none")
        out.append({"direction": "either", "families": None, **rule})
    return out


def read_catalogue(path: Path, sae_ids: list[str]) -> dict[tuple[str, int], Feature]:
    """Catalogue lines by (sae, index), in the order of the file."""
    out: dict[tuple[str, int], Feature] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        key = (row["sae"], row["index"])
        if key in out or row["sae"] not in sae_ids:
            raise ConfigError(f"catalogue: expected each pair of a known SAE once, found {key}")
        out[key] = Feature(
            sae=row["sae"],
            index=row["index"],
            label=row.get("label"),
            families=row.get("families", []),
            verdict=row.get("verdict", "unknown"),
            role=row.get("role", "both"),
            activation_min=float(row.get("activation_min", 0.0)),
        )
    return out


def read_config(path: Path) -> Config:
    """Reads one YAML file; relative paths start at its folder."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    _refuse_unknown("configuration", raw, set(KNOWN))
    for section, keys in KNOWN.items():
        if keys is not None and raw.get(section) is not None:
            _refuse_unknown(section, raw[section], keys)
    for sae in raw.get("saes") or []:
        _refuse_unknown("saes", sae, KNOWN_SAE)
    folder = path.resolve().parent
    model = {"dtype": "f32", "head_index": None, "head_weights": None, "pooling": None, "template": "none", "append_eos": False, "max_tokens": None,
             "on_too_long": "refuse", **raw["model"]}
    attribution = {"method": "grad", "when": "all", "ig_steps": 10, "ig_rule": "midpoint", "scope": "completion",
                   "top": 32, "completeness": False, **(raw.get("attribution") or {})}
    reward = raw.get("reward") or {}
    config = Config(
        folder=folder,
        model=model,
        saes=raw.get("saes") or [],
        attribution=attribution,
        each=bool((raw.get("ablation") or {}).get("each", False)),
        rules=_read_rules(raw.get("rules") or [], reward.get("sd")),
        reward_sd=reward.get("sd"),
        trainer_tolerance=float(reward.get("trainer_tolerance", 0.02)),
    )
    if raw.get("catalogue"):
        config.catalogue = read_catalogue(folder / raw["catalogue"], [s["id"] for s in config.saes])
    return config
